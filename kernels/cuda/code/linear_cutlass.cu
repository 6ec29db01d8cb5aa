// A product for many rows on Hopper's tensor cores (sm_90a), on CUTLASS' and CuTe's headers: of bfloat16
// numbers or, with FP8, of e4m3 codes times a scale per row of x and a scale per row of W.
//
//     out = softcap(act(x W^T + bias) * scale) + residual[residual_rows]
//
// Three warp groups. One thread of the first keeps TMA loads of x and W tiles in flight (128-byte
// swizzle, a ring of STAGES tiles guarded by mbarriers: cutlass::PipelineTmaAsync); the other two
// multiply (wgmma, operands in shared memory, float32 sums in registers), half of a tile's rows each,
// and write. Every cluster walks the live tiles by a fixed stride, so that loads of the next tile run
// under the epilogue. With CLUSTER 2 two programs with neighbouring row tiles share W's tile: each
// loads a half of it into both (multicast).
//
// Hopper's tensor cores keep about 14 bits of a sum of fp8 products (DeepSeek-V3 report, 3.3.2). So with
// FP8 each tile of 128 inputs has a sum of its own, which the ordinary cores add to the others in float32
// while the other warp group multiplies (as DeepGEMM does).
//
// launch.cuh is made by the build: PARAMETERS (from the launch's slots), every constant, and `nullptr`
// for slots that are absent. x and w are tensor maps: x [rows, K] in boxes of BLOCK_M rows, w [N, K] in boxes of
// BOX_N rows, 128 bytes wide. A gated product's tile has BOX_N gate rows, then the up rows of the same columns.

#include <cuda.h>
#include <cuda_bf16.h>

#include <cute/tensor.hpp>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "launch.cuh"

using namespace cute;

namespace {

using Element = conditional_t<FP8, cutlass::float_e4m3_t, cutlass::bfloat16_t>;
constexpr int BLOCK_K = 128 / int(sizeof(Element));  // 128 bytes: the swizzle's span
constexpr int THREADS = 128;  // of a warp group
constexpr int CONSUMERS = 2 * THREADS;
constexpr int PARTS = BLOCK_N / BOX_N;  // boxes of a w tile
constexpr int COLUMNS = GATED ? BOX_N : BLOCK_N;  // outputs of a tile
constexpr int K_TILES = (K + BLOCK_K - 1) / BLOCK_K;
constexpr int COLUMN_TILES = (OUTPUTS + COLUMNS - 1) / COLUMNS;
constexpr int STAGE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K * int(sizeof(Element));

static_assert(WARPS == 12, "a producer and two consumer warp groups");
static_assert(!GATED || PARTS == 2, "gate rows and up rows are one box each");
static_assert(PARTS % CLUSTER == 0, "every program of a cluster loads as much of w");
static_assert(OUTPUTS % 8 == 0, "outputs are written 8 at a time");

using Tile = Shape<Int<BLOCK_M>, Int<BLOCK_N>, Int<BLOCK_K>>;
using Mma = decltype(make_tiled_mma(
    GMMA::ss_op_selector<Element, Element, float, Tile, GMMA::Major::K, GMMA::Major::K>(),
    Layout<Shape<_2, _1, _1>>{}));
using ShapeA = Shape<Int<BLOCK_M>, Int<BLOCK_K>, Int<STAGES>>;
using ShapeB = Shape<Int<BLOCK_N>, Int<BLOCK_K>, Int<STAGES>>;
using LayoutA = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, ShapeA{}));
using LayoutB = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, ShapeB{}));
// A box lands as TMA writes it: rows of 128 bytes one after another, their 16-byte pieces exchanged by
// the row's number modulo 8 (address bits 4 to 6 with 7 to 9).
static_assert(is_same_v<decltype(LayoutA{}.layout_a()), Swizzle<3, 4, 3>>);
static_assert(is_same_v<decltype(LayoutB{}.layout_a()), Swizzle<3, 4, 3>>);
static_assert(LayoutA{}.layout_b()(9, 5, 1) == (BLOCK_M + 9) * BLOCK_K + 5);
static_assert(LayoutB{}.layout_b()(BLOCK_N - 1, 5, 1) == (2 * BLOCK_N - 1) * BLOCK_K + 5);
using Pipeline = cutlass::PipelineTmaAsync<STAGES>;
using State = typename Pipeline::PipelineState;
using ClusterShape = Shape<Int<CLUSTER>, _1, _1>;

struct Shared {
  alignas(1024) Element a[cosize_v<LayoutA>];
  alignas(1024) Element b[cosize_v<LayoutB>];
  alignas(16) typename Pipeline::SharedStorage pipeline;
};
static_assert(sizeof(Shared) + 1024 <= SHARED, "SHARED is too small");

// The order of tiles: SUPER row tiles (of clusters) beside each other, then the next columns, so
// that what runs at a time shares rows and columns in L2.
struct Walk {
  int row_tiles;  // of a cluster
  int units;

  CUTE_DEVICE explicit Walk(int rows) {
    row_tiles = (rows + BLOCK_M * CLUSTER - 1) / (BLOCK_M * CLUSTER);
    units = row_tiles * COLUMN_TILES;
  }

  // First row and column tile of a unit.
  CUTE_DEVICE void at(int unit, int rank, int& row, int& column_tile) const {
    constexpr int width = SUPER * COLUMN_TILES;
    int first = unit / width * SUPER;
    int high = min(row_tiles - first, SUPER);
    int inside = unit % width;
    row = ((first + inside % high) * CLUSTER + rank) * BLOCK_M;
    column_tile = inside / high;
  }
};

enum class Act { none, silu, gelu, gelu_tanh, relu, relu2, swiglu, geglu, geglu_tanh, swiglu_clamped };
constexpr Act KIND = Act::ACT;

CUTE_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

template <Act A>
CUTE_DEVICE float activate(float x) {
  if constexpr (A == Act::silu) return x * sigmoid(x);
  if constexpr (A == Act::gelu) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  if constexpr (A == Act::gelu_tanh)  // (1 + tanh u) / 2 is the sigmoid of 2u
    return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
  if constexpr (A == Act::relu) return x < 0.0f ? 0.0f : x;
  if constexpr (A == Act::relu2) return x < 0.0f ? 0.0f : x * x;
  if constexpr (A == Act::none) return x;
}

[[maybe_unused]] CUTE_DEVICE float gated(float gate, float up) {
  if constexpr (KIND == Act::swiglu_clamped) {
    float g = fminf(gate, 7.0f);
    float u = fminf(fmaxf(up, -7.0f), 7.0f);
    return (u + 1.0f) * g * sigmoid(1.702f * g);
  } else if constexpr (KIND == Act::geglu) {
    return activate<Act::gelu>(gate) * up;
  } else if constexpr (KIND == Act::geglu_tanh) {
    return activate<Act::gelu_tanh>(gate) * up;
  } else {
    return activate<Act::silu>(gate) * up;
  }
}

// Eight neighbours in memory, 16-byte aligned.
[[maybe_unused]] CUTE_DEVICE void load8(float (&v)[8], const float* p) {
  float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

[[maybe_unused]] CUTE_DEVICE void load8(float (&v)[8], const __nv_bfloat16* p) {
  uint4 raw = *reinterpret_cast<const uint4*>(p);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = __uint_as_float(words[i] << 16);
    v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

[[maybe_unused]] CUTE_DEVICE void store8(float* p, const float (&v)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

[[maybe_unused]] CUTE_DEVICE void store8(__nv_bfloat16* p, const float (&v)[8]) {
  uint32_t words[4];
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    words[i] = *reinterpret_cast<uint32_t*>(&pair);
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}

template <class P>
constexpr bool present = !is_same_v<remove_cv_t<P>, decltype(nullptr)>;

// Codes times what they stand for: a scale of the row and one of each column.
template <class P, class I>
CUTE_DEVICE void scale8(float (&v)[8], float row, P p, I offset) {
  float column[8];
  load8(column, p + offset);
  CUTE_UNROLL
  for (int i = 0; i < 8; ++i) v[i] *= row * column[i];
}

template <class P, class I>
CUTE_DEVICE void add8(float (&v)[8], P p, I offset) {
  float more[8];
  load8(more, p + offset);
  CUTE_UNROLL
  for (int i = 0; i < 8; ++i) v[i] += more[i];
}

// The thread whose bit is not set gives `b` for the other's `a`.
CUTE_DEVICE void exchange(float (&a)[2], float (&b)[2], bool set, int bit) {
  CUTE_UNROLL
  for (int c = 0; c < 2; ++c) {
    const float got = __shfl_xor_sync(0xffffffffu, set ? a[c] : b[c], bit);
    a[c] = set ? got : a[c];
    b[c] = set ? b[c] : got;
  }
}

// Among the four threads of a quad: pair[g] of thread t are columns 2t, 2t + 1 of group g (8 columns);
// afterwards thread t has the eight columns of group t. Two rounds of exchanges with the neighbours
// whose number differs in one bit.
CUTE_DEVICE void transpose_quad(float (&v)[8], float (&pair)[4][2], int t) {
  const bool odd = t & 1, high = t & 2;
  CUTE_UNROLL
  for (int g = 0; g < 4; g += 2) exchange(pair[g], pair[g + 1], odd, 1);
  CUTE_UNROLL
  for (int g = 0; g < 2; ++g) exchange(pair[g], pair[g + 2], high, 2);
  CUTE_UNROLL
  for (int s = 0; s < 4; ++s) {
    v[2 * s] = pair[s][0];
    v[2 * s + 1] = pair[s][1];
  }
}

// What follows a product; absent arrays are nullptr.
template <class XScale, class WScale, class Bias, class Residual, class Rows, class Out>
struct Epilogue {
  XScale x_scale;
  WScale w_scale;
  Bias bias;
  Residual residual;
  Rows residual_rows;
  Out out;

  CUTE_DEVICE Epilogue(XScale xs, WScale ws, Bias b, Residual r, Rows rr, Out o)
      : x_scale(xs), w_scale(ws), bias(b), residual(r), residual_rows(rr), out(o) {}
};

// Writes a tile. `sums` is ((2 columns, 2 rows, groups of 8 columns), row blocks of both warp groups,
// 1), `where` the coordinates of its elements in the tile.
template <class Sums, class Where, class E>
CUTE_DEVICE void write(Sums const& sums, Where const& where, int row0, int column0, int rows,
                       E const& e) {
  static_assert(size<0, 0>(Sums{}) == 2 && size<0, 1>(Sums{}) == 2 && size<2>(Sums{}) == 1);
  static_assert(size<0, 2>(Sums{}) == BLOCK_N / 8);
  const int t = threadIdx.x % 4;
  CUTE_UNROLL
  for (int m = 0; m < size<1>(sums); ++m) {
    CUTE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + int(get<0>(where(make_coord(0, h, 0), m, 0)));
      const bool live = row < rows;
      long long from = row;
      if constexpr (present<decltype(e.residual_rows)>) from = live ? e.residual_rows[row] : 0;
      [[maybe_unused]] float x_scale = 0;
      if constexpr (FP8) x_scale = live ? e.x_scale[row] : 0;
      CUTE_UNROLL
      for (int g = 0; g < COLUMNS / 8; g += 4) {
        float first[4][2], second[4][2], v[8], up[8];
        CUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          CUTE_UNROLL
          for (int c = 0; c < 2; ++c) {
            first[i][c] = sums(make_coord(c, h, g + i), m, 0);
            if constexpr (GATED) second[i][c] = sums(make_coord(c, h, g + i + COLUMNS / 8), m, 0);
          }
        }
        transpose_quad(v, first, t);
        if constexpr (GATED) transpose_quad(up, second, t);
        const int column = column0 + (g + t) * 8;
        if (live && column < OUTPUTS) {
          if constexpr (FP8) {
            scale8(v, x_scale, e.w_scale, column);
            if constexpr (GATED) scale8(up, x_scale, e.w_scale, OUTPUTS + column);
          }
          if constexpr (present<decltype(e.bias)>) {
            add8(v, e.bias, column);
            if constexpr (GATED) add8(up, e.bias, OUTPUTS + column);
          }
          CUTE_UNROLL
          for (int i = 0; i < 8; ++i) {
            if constexpr (GATED) {
              v[i] = gated(v[i], up[i]);
            } else {
              v[i] = activate<KIND>(v[i]);
            }
            v[i] *= SCALE;
            if constexpr (SOFTCAP != 0)
              v[i] = SOFTCAP * (2.0f * sigmoid(v[i] * (2.0f / SOFTCAP)) - 1.0f);
          }
          if constexpr (present<decltype(e.residual)>) add8(v, e.residual, from * OUTPUTS + column);
          store8(e.out + static_cast<long long>(row) * OUTPUTS + column, v);
        }
      }
    }
  }
}

CUTE_DEVICE void produce(CUtensorMap const* x, CUtensorMap const* w, Shared& shared,
                         Pipeline& pipeline, Walk const& walk, int rank, int first, int step) {
  constexpr uint64_t hint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr uint16_t everyone = (1 << CLUSTER) - 1;
  State state = cutlass::make_producer_start_state<Pipeline>();
  for (int unit = first; unit < walk.units; unit += step) {
    int row, column_tile;
    walk.at(unit, rank, row, column_tile);
    for (int k = 0; k < K_TILES; ++k) {
      pipeline.producer_acquire(state);
      uint64_t* full = pipeline.producer_get_barrier(state);
      const int stage = state.index();
      SM90_TMA_LOAD_2D::copy(x, full, hint, shared.a + stage * BLOCK_M * BLOCK_K, k * BLOCK_K, row);
      CUTE_UNROLL
      for (int i = 0; i < PARTS / CLUSTER; ++i) {
        const int part = rank * (PARTS / CLUSTER) + i;
        const int w_row = GATED ? part * OUTPUTS + column_tile * COLUMNS
                                : column_tile * COLUMNS + part * BOX_N;
        Element* place = shared.b + (stage * BLOCK_N + part * BOX_N) * BLOCK_K;
        if constexpr (CLUSTER == 1) {
          SM90_TMA_LOAD_2D::copy(w, full, hint, place, k * BLOCK_K, w_row);
        } else {
          SM90_TMA_LOAD_MULTICAST_2D::copy(w, full, everyone, hint, place, k * BLOCK_K, w_row);
        }
      }
      ++state;
    }
  }
  cutlass::arch::launch_dependent_grids();
  // The other program of the cluster may still read and signal here.
  pipeline.producer_tail(state);
}

template <class E>
CUTE_DEVICE void consume(Shared& shared, Pipeline& pipeline, Walk const& walk, int rank, int first,
                         int step, int rows, E const& epilogue) {
  const int thread = threadIdx.x - THREADS;
  const int group = __shfl_sync(0xffffffffu, thread / THREADS, 0);
  Tensor a = make_tensor(make_smem_ptr(shared.a), LayoutA{});
  Tensor b = make_tensor(make_smem_ptr(shared.b), LayoutB{});
  Mma mma;
  // Operands are descriptors, the same for all threads of a warp group.
  auto slice = mma.get_slice(group * THREADS);
  Tensor left = slice.make_fragment_A(slice.partition_A(a));   // (MMA, M, K, STAGES)
  Tensor right = slice.make_fragment_B(slice.partition_B(b));  // (MMA, N, K, STAGES)
  Tensor sums = partition_fragment_C(mma, Shape<Int<BLOCK_M>, Int<BLOCK_N>>{});
  Tensor tile_sums = make_fragment_like(sums);  // of FP8
  Tensor where = mma.get_slice(thread).partition_C(
      make_identity_tensor(Shape<Int<BLOCK_M>, Int<BLOCK_N>>{}));

  auto multiply = [&](auto& into, int stage) {
    warpgroup_fence_operand(into);
    warpgroup_arrive();
    CUTE_UNROLL
    for (int i = 0; i < size<2>(left); ++i) {
      gemm(mma, left(_, _, i, stage), right(_, _, i, stage), into);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  };

  State read, release;  // one tile apart: a tile is given back when the product after it runs
  for (int unit = first; unit < walk.units; unit += step) {
    int row, column_tile;
    walk.at(unit, rank, row, column_tile);
    if constexpr (FP8) {
      clear(sums);
      CUTE_NO_UNROLL
      for (int k = 0; k < K_TILES; ++k) {
        pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
        mma.accumulate_ = GMMA::ScaleOut::Zero;
        multiply(tile_sums, read.index());
        warpgroup_wait<0>();
        warpgroup_fence_operand(tile_sums);
        pipeline.consumer_release(read);
        ++read;
        CUTE_UNROLL
        for (int i = 0; i < size(sums); ++i) sums(i) += tile_sums(i);
      }
    } else {
      mma.accumulate_ = GMMA::ScaleOut::Zero;
      CUTE_NO_UNROLL
      for (int k = 0; k < K_TILES; ++k) {
        pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
        multiply(sums, read.index());
        warpgroup_wait<1>();
        warpgroup_fence_operand(sums);
        if (k > 0) {
          pipeline.consumer_release(release);
          ++release;
        }
        ++read;
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      pipeline.consumer_release(release);
      ++release;
    }
    write(sums, where, row, column_tile * COLUMNS, rows, epilogue);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
#if CLUSTER > 1
    __cluster_dims__(CLUSTER, 1, 1)
#endif
    linear_kernel(PARAMETERS) {
  extern __shared__ char memory[];
  const uint32_t base = cast_smem_ptr_to_uint(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory + ((1024 - base % 1024) % 1024));

  const int group = cutlass::canonical_warp_group_idx();
  const bool leader = threadIdx.x == 0;
  typename Pipeline::Params params;
  params.transaction_bytes = STAGE_BYTES;
  params.role = group == 0 ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  params.is_leader = leader;
  params.num_consumers = CONSUMERS;
  Pipeline pipeline(shared.pipeline, params, ClusterShape{});
  if (leader) {
    prefetch_tma_descriptor(reinterpret_cast<TmaDescriptor const*>(&x));
    prefetch_tma_descriptor(reinterpret_cast<TmaDescriptor const*>(&w));
  }
  // Barriers are visible to the whole cluster before anyone signals.
  if constexpr (CLUSTER > 1) {
    cluster_arrive_relaxed();
    cluster_wait();
  } else {
    __syncthreads();
  }

  cutlass::arch::wait_on_dependent_grids();
  const int rows = min(live_ptr[LIVE], ROWS);
  const Walk walk(rows);
  const int rank = CLUSTER == 1 ? 0 : int(block_rank_in_cluster());
  const int first = blockIdx.x / CLUSTER;
  const int step = gridDim.x / CLUSTER;
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (leader) produce(&x, &w, shared, pipeline, walk, rank, first, step);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    const Epilogue epilogue(x_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, residual_rows_ptr,
                            out_ptr);
    consume(shared, pipeline, walk, rank, first, step, rows, epilogue);
  }
}
