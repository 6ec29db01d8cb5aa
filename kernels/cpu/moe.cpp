// Mixtures of experts: routing, the order of the (token, choice) pairs, the experts' linears and their weighted sum.
// Slots of each entry: kernels/cpu/moe.py.
#include "linear_call.h"

namespace {

using namespace hs;

constexpr int64_t MAX_EXPERTS = 1024, MAX_CHOICES = 64;
enum Score { SOFTMAX = 0, SIGMOID = 1, CHOSEN = 2 };

// out[i] = f(x[i]); the lanes f sees beyond the last are zero in x, and their results are dropped.
template <class F>
void each_vector(const float* x, int64_t n, float* out, F f) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(out + i, f(loadf(x + i)));
    if (i < n) store_part(out + i, f(load_part(x + i, (int)(n - i))), (int)(n - i));
}

// Probabilities of n logits; `out` may be `x`.
void softmax(const float* x, int64_t n, float* out) {
    float top = x[0], total = 0;
    for (int64_t i = 1; i < n; i++) top = x[i] > top ? x[i] : top;
    each_vector(x, n, out, [&](vf v) { return vexp(v - top); });
    for (int64_t i = 0; i < n; i++) total += out[i];
    for (int64_t i = 0; i < n; i++) out[i] /= total;
}

// The k best of n, largest first, ties to the lower index; what is taken becomes -infinity.
void best(float* x, int64_t n, int64_t k, int32_t* ids) {
    for (int64_t j = 0; j < k; j++) {
        int64_t top = -1;
        for (int64_t i = 0; i < n; i++)
            if (x[i] > -INFINITY && (top < 0 || x[i] > x[top])) top = i;
        if (top < 0) top = j;  // nothing but NaN: any expert is as good, none may be out of range
        ids[j] = (int32_t)top;
        x[top] = -INFINITY;
    }
}

struct Router {
    int64_t experts, k, groups, kept, group_best;
    int score;
    bool renormalise;
    float scale;
    const float* bias;

    void choose(const float* logits, int32_t* ids, float* weights) const {
        float scores[MAX_EXPERTS], choice[MAX_EXPERTS];
        if (score == SOFTMAX)
            softmax(logits, experts, scores);
        else if (score == SIGMOID)
            each_vector(logits, experts, scores, [](vf v) { return sigmoid(v); });
        else
            memcpy(scores, logits, experts * sizeof(float));
        for (int64_t i = 0; i < experts; i++) choice[i] = bias ? scores[i] + bias[i] : scores[i];
        if (groups > 1) drop_groups(choice);
        best(choice, experts, k, ids);
        for (int64_t j = 0; j < k; j++) weights[j] = scores[ids[j]];
        if (score == CHOSEN) softmax(weights, k, weights);
        float divisor = 1.0f;
        if (renormalise) {
            divisor = 1e-20f;
            for (int64_t j = 0; j < k; j++) divisor += weights[j];
        }
        for (int64_t j = 0; j < k; j++) weights[j] = weights[j] / divisor * scale;
    }

    void drop_groups(float* choice) const {
        float worth[MAX_EXPERTS];
        int32_t ids[MAX_EXPERTS];
        bool keep[MAX_EXPERTS] = {};
        const int64_t size = experts / groups;
        for (int64_t g = 0; g < groups; g++) {
            float own[MAX_EXPERTS];
            memcpy(own, choice + g * size, size * sizeof(float));
            best(own, size, group_best, ids);
            worth[g] = 0;
            for (int64_t j = 0; j < group_best; j++) worth[g] += choice[g * size + ids[j]];
        }
        best(worth, groups, kept, ids);
        for (int64_t j = 0; j < kept; j++) keep[ids[j]] = true;
        for (int64_t i = 0; i < experts; i++)
            if (!keep[i / size]) choice[i] = -INFINITY;
    }
};

// y[p] = act(W_e x[p / shared] + b_e) for every pair p of expert e.
template <int FMT>
void experts(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, X, ORDER, STARTS, BIAS, OUT, WORK, EXPERTS, K, N, SHARED, ACT, DATA };
    constexpr bool GROUPED = FMT == INT8 || FMT == INT4;
    const int32_t *order = (const int32_t*)a[ORDER].p, *starts = (const int32_t*)a[STARTS].p;
    const float* bias = (const float*)a[BIAS].p;
    Linear c;
    c.x = (const float*)a[X].p;
    c.x_stride = a[K].i;
    c.shared = a[SHARED].i;
    c.out = (float*)a[OUT].p;
    c.n = c.out_stride = a[N].i;
    c.act = a[ACT].i;
    c.gated = c.act != 0;
    c.w = bind_weight(FMT, a[K].i, a + DATA);
    const Weight first = c.w;
    uint8_t* work = (uint8_t*)a[WORK].p;
    auto each = [&](auto visit) {  // experts that have a pair, with the place of their prepared rows
        int64_t prepared = 0;
        for (int64_t e = 0; e < a[EXPERTS].i; e++) {
            c.t = starts[e + 1] - starts[e];
            if (!c.t) continue;
            c.rows = c.places = order + starts[e];
            c.bias = bias ? bias + e * c.n * (c.gated ? 2 : 1) : nullptr;
            c.w.data = first.tile(e * c.tiles());
            if (GROUPED) c.w.scale = first.tile_scale(e * c.tiles());
            c.work = work + prepared;
            if (c.t > FEW_ROWS) prepared += round_up(c.t, 16) * prepared_bytes<FMT>(c.w);
            visit(e);
        }
    };
    bool many = false;
    if (ctx->phase == 0)
        each([&](int64_t e) {
            if (c.t <= FEW_ROWS) return;
            many = true;
            hs_ctx turned = *ctx;  // another thread begins at every expert
            turned.thread = (int32_t)((ctx->thread + e) % ctx->threads);
            prepare<FMT>(&turned, c);
        });
    if (many) return hs_again(ctx);
    Linear held;  // an expert is computed when the one after it is known
    each([&](int64_t) {
        if (held.t) {
            held.then = c.from(split(c.tiles(), ctx).begin);
            product<FMT>(ctx, held);
        }
        held = c;
    });
    held.then = ctx->then;
    if (held.t) product<FMT>(ctx, held);
}

}  // namespace

HS_EXPORT void hs_route(const hs_ctx* ctx, const hs_arg* a) {
    enum {
        LIVE, LIVE_INDEX, LOGITS, BIAS, IDS, WEIGHTS,
        EXPERTS, CHOICES, SCORE, GROUPS, KEPT_GROUPS, GROUP_BEST, RENORMALISE, SCALE
    };
    Router r;
    r.experts = a[EXPERTS].i;
    r.k = a[CHOICES].i;
    r.groups = a[GROUPS].i;
    r.kept = a[KEPT_GROUPS].i;
    r.group_best = a[GROUP_BEST].i;
    r.score = (int)a[SCORE].i;
    r.renormalise = a[RENORMALISE].i != 0;
    r.scale = (float)a[SCALE].f;
    r.bias = (const float*)a[BIAS].p;
    Range range = split(((const int32_t*)a[LIVE].p)[a[LIVE_INDEX].i], ctx);
    for (int64_t t = range.begin; t < range.end; t++)
        r.choose((const float*)a[LOGITS].p + t * r.experts, (int32_t*)a[IDS].p + t * r.k, (float*)a[WEIGHTS].p + t * r.k);
}

// A counting sort by one thread: it moves four bytes per pair, the experts' linears thousands.
HS_EXPORT void hs_expert_order(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, LIVE_INDEX, IDS, ORDER, STARTS, EXPERTS, CHOICES };
    if (ctx->thread) return;
    const int32_t* ids = (const int32_t*)a[IDS].p;
    int32_t *order = (int32_t*)a[ORDER].p, *starts = (int32_t*)a[STARTS].p;
    const int64_t experts = a[EXPERTS].i, pairs = ((const int32_t*)a[LIVE].p)[a[LIVE_INDEX].i] * a[CHOICES].i;
    int32_t next[MAX_EXPERTS];
    memset(starts, 0, (experts + 1) * sizeof(int32_t));
    for (int64_t p = 0; p < pairs; p++) starts[ids[p] + 1]++;
    for (int64_t e = 0; e < experts; e++) {
        next[e] = starts[e];
        starts[e + 1] += starts[e];
    }
    for (int64_t p = 0; p < pairs; p++) order[next[ids[p]]++] = (int32_t)p;
}

HS_EXPORT void hs_moe_combine(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, LIVE_INDEX, Y, WEIGHTS, SHARED, GATE, RESIDUAL, OUT, D, CHOICES };
    constexpr int64_t PART = 256;  // columns of a piece of work
    const int64_t dim = a[D].i, k = a[CHOICES].i, parts = (dim + PART - 1) / PART;
    const float *y = (const float*)a[Y].p, *weights = (const float*)a[WEIGHTS].p;
    const float *shared = (const float*)a[SHARED].p, *gate = (const float*)a[GATE].p;
    const float* residual = (const float*)a[RESIDUAL].p;
    Range range = split(((const int32_t*)a[LIVE].p)[a[LIVE_INDEX].i] * parts, ctx);
    for (int64_t u = range.begin; u < range.end; u++) {
        const int64_t t = u / parts, begin = u % parts * PART, end = begin + PART < dim ? begin + PART : dim;
        const vf share = gate ? sigmoid(splat(gate[t])) : splat(1.0f);
        for (int64_t i = begin; i < end; i += VL) {
            const int left = end - i < VL ? (int)(end - i) : VL;
            auto at = [&](const float* p) { return left < VL ? load_part(p + i, left) : loadf(p + i); };
            vf sum{};
            for (int64_t j = 0; j < k; j++) sum = fma(splat(weights[t * k + j]), at(y + (t * k + j) * dim), sum);
            if (shared) sum = fma(share, at(shared + t * dim), sum);
            if (residual) sum += at(residual + t * dim);
            put((float*)a[OUT].p + t * dim + i, sum, left);
        }
    }
}

HS_EXPORT void hs_experts_f32(const hs_ctx* ctx, const hs_arg* a) { experts<F32>(ctx, a); }
HS_EXPORT void hs_experts_bf16(const hs_ctx* ctx, const hs_arg* a) { experts<BF16>(ctx, a); }
HS_EXPORT void hs_experts_int8(const hs_ctx* ctx, const hs_arg* a) { experts<INT8>(ctx, a); }
HS_EXPORT void hs_experts_int4(const hs_ctx* ctx, const hs_arg* a) { experts<INT4>(ctx, a); }
HS_EXPORT void hs_experts_bf16_widened(const hs_ctx* ctx, const hs_arg* a) { experts<WIDENED>(ctx, a); }
