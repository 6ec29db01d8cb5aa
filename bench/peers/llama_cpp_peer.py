"""llama.cpp through the low-level C API of llama-cpp-python, in llama.cpp's own environment (see
bench/peers.md).

A step is one `llama_decode` of one token per sequence, without sampling. Every sequence has its
own KV stream: nothing is shared between sequences that are not equal. Each workload runs with the
attention that serves llama.cpp best: flash attention prefills faster (1,950 against 1,450 tok/s,
135M Q4_0, 2 cores with AMX, 2026-11) and decodes slower (75 against 180 tok/s at batch 8, context
1024).
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np


class LlamaCpp:
    def __init__(self, path: str, threads: int, max_batch: int, context: int) -> None:
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        model_params = llama_cpp.llama_model_default_params()
        # Mapped weights would keep the file's layout; without the mapping llama.cpp repacks them
        # for the machine.
        model_params.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads, self.max_batch, self.context = threads, max_batch, context
        self.ctx: Any = None
        self.shape = (0, False)  # sequences and flash attention of the open context
        self.held = 0  # tokens that every sequence of it holds
        self.rng = np.random.default_rng(0)

    def version(self) -> str:
        features = llama_cpp.llama_print_system_info().decode()
        return f"llama-cpp-python {llama_cpp.__version__}; {features}"

    def kv_token_bytes(self) -> float:
        heads = llama_cpp.llama_model_n_head(self.model)
        width = llama_cpp.llama_model_n_embd(self.model) // heads
        kv_heads = llama_cpp.llama_model_n_head_kv(self.model)
        float16 = 2
        return 2 * llama_cpp.llama_model_n_layer(self.model) * kv_heads * width * float16

    def _open(self, batch: int, flash: bool) -> None:
        """A context of exactly `batch` streams, kept until another is wanted."""
        if self.shape == (batch, flash):
            return
        if self.ctx is not None:
            llama_cpp.llama_free(self.ctx)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * self.context
        params.n_batch = 2048
        params.n_ubatch = 512
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        params.flash_attn_type = int(flash)
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError(f"llama.cpp cannot open a context of {params.n_ctx} tokens")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.shape, self.held = (batch, flash), 0

    def _run(self, rows: list[tuple[int, int]], last_only: bool) -> None:
        """Decodes random tokens at (sequence, position) rows and waits for the logits."""
        tokens = self.rng.integers(0, self.vocab, len(rows)).tolist()
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (sequence, position) in enumerate(rows):
            batch.token[i] = tokens[i]
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = not last_only or i == len(rows) - 1
        status = llama_cpp.llama_decode(self.ctx, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(self.ctx)

    def _fill(self, batch: int, context: int) -> None:
        self._open(batch, flash=False)
        if self.held < context:
            llama_cpp.llama_memory_clear(self.memory, True)
            for sequence in range(batch):
                self._run([(sequence, p) for p in range(context)], last_only=True)
        self.held = context
        for sequence in range(batch):
            llama_cpp.llama_memory_seq_rm(self.memory, sequence, context, -1)

    def prefill(self, tokens: int) -> float:
        self._open(1, flash=True)
        llama_cpp.llama_memory_clear(self.memory, True)
        start = time.perf_counter()
        self._run([(0, p) for p in range(tokens)], last_only=True)
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        self._fill(batch, context)
        seconds = []
        for step in range(steps):
            start = time.perf_counter()
            self._run([(sequence, context + step) for sequence in range(batch)], last_only=False)
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        if self.ctx is not None:
            llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)


def open_runner(*, path: str, threads: int, max_batch: int, context: int) -> LlamaCpp:
    return LlamaCpp(path, threads, max_batch, context)
