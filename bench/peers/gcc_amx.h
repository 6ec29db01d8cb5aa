// Forced into every C++ file of llama.cpp (`make peers`): gcc 12 declares only the first eight bytes of the tile configuration
// as an input of `_tile_loadconfig`, drops the stores to the rest, and the instruction then faults.
#pragma once
#if defined(__AMX_TILE__)
#include <immintrin.h>
static inline void hs_tile_loadconfig(const void* config) {
    __asm__ volatile("" ::"r"(config) : "memory");
    _tile_loadconfig(config);
}
#define _tile_loadconfig(config) hs_tile_loadconfig(config)
#endif
