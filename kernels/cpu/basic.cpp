// Row-wise kernels: embedding, gather, norms, elementwise. Slots of each entry: kernels/cpu/basic.py.
#include <vector>

#include "linear_call.h"

namespace {

using namespace hs;

struct Piece {
    int64_t begin, end;
};

// This thread's share of n units.
Piece share(const hs_ctx* ctx, int64_t n) { return {n * ctx->thread / ctx->threads, n * (ctx->thread + 1) / ctx->threads}; }

int64_t live(const hs_arg& a, int64_t index) { return ((const int32_t*)a.p)[index]; }

// out[i] = f(x[i], y[i]) over the first n numbers, split without regard to row ends.
template <class F>
void elementwise(const hs_ctx* ctx, int64_t n, const void* first, const void* second, void* result, F f) {
    const float *x = (const float*)first, *y = (const float*)second;
    float* out = (float*)result;
    Piece piece = share(ctx, n);
    int64_t i = piece.begin;
    for (; i + VL <= piece.end; i += VL) store(out + i, f(loadf(x + i), loadf(y + i)));
    if (int rest = (int)(piece.end - i)) store_part(out + i, f(load_part(x + i, rest), load_part(y + i, rest)), rest);
}

}  // namespace

HS_EXPORT void hs_embed(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, TOKENS, LAST_TOKEN, OUT, SCALE_BY, FORMAT, D, GROUP, DATA, SCALE };
    const int32_t *tokens = (const int32_t*)a[TOKENS].p, *last_token = (const int32_t*)a[LAST_TOKEN].p;
    bool grouped = a[GROUP].i != 0;
    Weight table{(int)a[FORMAT].i, a[D].i, a[GROUP].i, a[DATA].p, grouped ? (const uint16_t*)a[SCALE].p : nullptr};
    float scale = (float)a[SCALE_BY].f;
    Piece piece = share(ctx, live(a[LIVE], 0));
    for (int64_t t = piece.begin; t < piece.end; t++) {
        float* out = (float*)a[OUT].p + t * table.k;
        unpack_row(table, tokens[t] < 0 ? last_token[-1 - tokens[t]] : tokens[t], out);
        if (scale != 1.0f)
            for (int64_t i = 0; i < table.k; i++) out[i] *= scale;
    }
}

HS_EXPORT void hs_embed_positions(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, X, POSITIONS, OUT, OFFSET, FORMAT, TYPES_FORMAT, D, GROUP, TABLE, TYPES, TABLE_SCALE, TYPES_SCALE };
    const int32_t* positions = (const int32_t*)a[POSITIONS].p;
    auto stored = [&](int format, int data, int scale) {
        bool grouped = a[GROUP].i != 0;
        return Weight{(int)a[format].i, a[D].i, a[GROUP].i, a[data].p, grouped ? (const uint16_t*)a[scale].p : nullptr};
    };
    Weight table = stored(FORMAT, TABLE, TABLE_SCALE), types = stored(TYPES_FORMAT, TYPES, TYPES_SCALE);
    Piece piece = share(ctx, live(a[LIVE], 0));
    std::vector<float> row(table.k);
    for (int64_t t = piece.begin; t < piece.end; t++) {
        const float* x = (const float*)a[X].p + t * table.k;
        float* out = (float*)a[OUT].p + t * table.k;
        unpack_row(table, positions[t] + a[OFFSET].i, out);
        unpack_row(types, 0, row.data());
        for (int64_t i = 0; i < table.k; i++) out[i] = x[i] + out[i] + row[i];
    }
}

// One vector per sequence: its last token's, its first one's, or the mean; at length 1 if asked for.
HS_EXPORT void hs_pool(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, X, SEQ_START, EMBEDDING, STATUS, D, POOLING, NORMALISE };
    enum { LAST, CLS, MEAN };
    const int32_t* starts = (const int32_t*)a[SEQ_START].p;
    int64_t dim = a[D].i, pooling = a[POOLING].i;
    Piece piece = share(ctx, live(a[LIVE], 1));
    for (int64_t s = piece.begin; s < piece.end; s++) {
        int64_t first = starts[s], end = starts[s + 1];
        const float* x = (const float*)a[X].p + (pooling == LAST ? end - 1 : first) * dim;
        float* out = (float*)a[EMBEDDING].p + s * dim;
        memcpy(out, x, dim * sizeof(float));
        if (pooling == MEAN) {
            for (int64_t t = 1; t < end - first; t++)
                for (int64_t i = 0; i < dim; i++) out[i] += x[t * dim + i];
            for (int64_t i = 0; i < dim; i++) out[i] /= (float)(end - first);
        }
        double squares = 0;
        for (int64_t i = 0; i < dim; i++) squares += (double)out[i] * out[i];
        double length = std::sqrt(squares);
        bool finite = squares <= 1.7e308;  // false too for what is not a number
        ((int32_t*)a[STATUS].p)[s] = !finite;
        if (!finite)
            memset(out, 0, dim * sizeof(float));
        else if (a[NORMALISE].i)
            for (int64_t i = 0; i < dim; i++) out[i] = (float)(out[i] / (length > 1e-12 ? length : 1e-12));
    }
}

HS_EXPORT void hs_gather(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, X, ROWS, OUT, D };
    const int32_t* rows = (const int32_t*)a[ROWS].p;
    int64_t dim = a[D].i;
    Piece piece = share(ctx, live(a[LIVE], 2));
    for (int64_t r = piece.begin; r < piece.end; r++)
        memcpy((float*)a[OUT].p + r * dim, (const float*)a[X].p + rows[r] * dim, dim * sizeof(float));
}

// All row and head norms: a row is HEADS pieces of D, piece h with the weights w[h * OWN ...].
HS_EXPORT void hs_norm(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, LIVE_INDEX, X, W, BIAS, RESIDUAL, OUT, HEADS, D, OWN, CENTRE, EPS };
    int64_t dim = a[D].i, heads = a[HEADS].i;
    const float *bias = (const float*)a[BIAS].p, *residual = (const float*)a[RESIDUAL].p;
    float eps = (float)a[EPS].f;
    Piece piece = share(ctx, live(a[LIVE], a[LIVE_INDEX].i) * heads);
    for (int64_t i = piece.begin; i < piece.end; i++) {
        const float *x = (const float*)a[X].p + i * dim, *w = (const float*)a[W].p + i % heads * a[OWN].i;
        float* out = (float*)a[OUT].p + i * dim;
        if (a[CENTRE].i)
            layer_norm(x, w, bias, eps, dim, out);
        else
            rms_norm(x, w, eps, dim, out);
        if (residual)
            for (int64_t j = 0; j < dim; j++) out[j] += residual[i * dim + j];
    }
}

HS_EXPORT void hs_gated(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, LIVE_INDEX, GATE, UP, OUT, D, ACT };
    int64_t act = a[ACT].i, n = live(a[LIVE], a[LIVE_INDEX].i) * a[D].i;
    elementwise(ctx, n, a[GATE].p, a[UP].p, a[OUT].p, [=](vf gate, vf up) { return activate(act, gate) * up; });
}

HS_EXPORT void hs_activation(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, LIVE_INDEX, X, OUT, D, ACT };
    int64_t act = a[ACT].i, n = live(a[LIVE], a[LIVE_INDEX].i) * a[D].i;
    elementwise(ctx, n, a[X].p, a[X].p, a[OUT].p, [=](vf x, vf) { return activate(act, x); });
}

HS_EXPORT void hs_clip(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, LIVE_INDEX, X, OUT, D, LIMIT };
    float limit = (float)a[LIMIT].f;
    int64_t n = live(a[LIVE], a[LIVE_INDEX].i) * a[D].i;
    elementwise(ctx, n, a[X].p, a[X].p, a[OUT].p, [=](vf x, vf) { return vmax(vmin(x, splat(limit)), splat(-limit)); });
}

HS_EXPORT void hs_add(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, LIVE_INDEX, A, B, OUT, D };
    elementwise(ctx, live(a[LIVE], a[LIVE_INDEX].i) * a[D].i, a[A].p, a[B].p, a[OUT].p, [](vf x, vf y) { return x + y; });
}
