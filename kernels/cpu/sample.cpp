// Token state and sampling. Slots of each entry: kernels/cpu/sample.py; what is computed: kernels/ops/sample.py.
//
// Phase 0 reads each row's logits once, in blocks of the vocabulary shared out over the threads: largest value, sums, finiteness.
// Phase 1 finishes each row on one thread. A greedy row is done; a draw without filters looks again at the one block it falls in;
// top-k, top-p and min-p gather the few candidates near the maximum and select among them, without sorting the vocabulary.
#include <algorithm>

#include "linear_call.h"

namespace {

using namespace hs;

constexpr int64_t BLOCK = 4096;   // vocabulary entries of a phase-0 item; fixes the order of summation
constexpr int64_t STRIP = 512;    // summed in float32, then in double
constexpr int TOP = 20;
constexpr int32_t SEEN = 1 << 30;
constexpr float GREEDY_BELOW = 1e-5f;  // temperatures that would overflow are greedy
enum RowFlag { PENALTIES = 1, LOGPROB = 2 };
enum Status { NOT_FINITE = 1, NOTHING_ALLOWED = 2 };

struct Partial {
    float best;      // of the adjusted logits
    int32_t best_id;
    float raw_max;
    int32_t bad;     // a logit is not finite
    double raw_sum;  // exp(logit - raw_max)
    double weight;   // exp((adjusted - best) / temperature)
};

vi lanes() {
    vi v;
    for (int i = 0; i < VL; i++) v[i] = i;
    return v;
}

struct Row {
    const float* logits;
    const int32_t* counts;
    const float* bias;
    const uint32_t* mask;  // bits of the allowed tokens, or null: all are
    int64_t vocab;
    int32_t target, flags, top, top_k;
    float temperature, top_p, min_p, frequency, presence, repetition;

    bool greedy() const { return temperature < GREEDY_BELOW; }
    bool sampled() const { return target < 0; }
    bool wants_logprob() const { return (flags & LOGPROB) || target >= 0; }
    bool wants_sum() const { return wants_logprob() || top > 0; }
    bool limits_k() const { return top_k > 0 && top_k < vocab; }
    bool limits_p() const { return top_p < 1.0f; }
    bool limited() const { return limits_k() || limits_p() || min_p > 0.0f; }

    // Lanes beyond the vocabulary are -infinity.
    vf raw(int64_t i) const {
        if (i + VL <= vocab) return loadf(logits + i);
        return select(lanes() < (int32_t)(vocab - i), load_part(logits + i, (int)(vocab - i)), splat(-INFINITY));
    }
    vf adjusted(int64_t i) const {
        vf z = flags & PENALTIES ? penalized(i) : raw(i);
        return mask ? allowed(i, z) : z;
    }

    // i is a multiple of VL, which divides 32: the lanes' bits are in one word.
    vf allowed(int64_t i, vf z) const {
        vi bits = vi{} + (int32_t)(mask[i / 32] >> (i % 32));
        return select((bits >> lanes() & 1) != 0, z, splat(-INFINITY));
    }

    vf penalized(int64_t i) const {
        vf x = raw(i);
        int64_t left = vocab - i;
        vi count{};
        vf extra{};
        if (left >= VL) {
            count = load<vi>(counts + i);
            extra = loadf(bias + i);
        } else {
            for (int j = 0; j < left; j++) count[j] = counts[i + j], extra[j] = bias[i + j];
        }
        vi output = count & (SEEN - 1);
        x = select(count != 0, select(x > 0.0f, x / repetition, x * repetition), x);
        x = x - to_float(output) * frequency - select(output > 0, splat(presence), vf{});
        return x + extra;
    }
};

struct Call {
    const int32_t *live, *row_token, *row_slot, *row_target, *row_flags, *row_top, *row_mask, *top_k;
    const uint32_t* masks;
    const float *logits, *temperature, *top_p, *min_p, *frequency, *presence, *repetition;
    const int64_t* seed;
    const int32_t* positions;
    int32_t* counts;
    const float* bias;
    int32_t *last_token, *token, *top_ids, *status;
    float *logprob, *top_logprobs;
    Partial* partial;
    int64_t columns, vocab, state_columns;

    int64_t blocks() const { return (vocab + BLOCK - 1) / BLOCK; }
    Row row(int64_t r) const {
        int64_t state = row_slot[r] * state_columns, words = (vocab + 31) / 32;
        const uint32_t* mask = row_mask[r] >= 0 && row_target[r] < 0 ? masks + row_mask[r] * words : nullptr;
        return {logits + r * columns, counts + state, bias + state, mask, vocab, row_target[r], row_flags[r], row_top[r],
                top_k[r], temperature[r], top_p[r], min_p[r], frequency[r], presence[r], repetition[r]};
    }
};

// Sum of exp((value(i) - max) * factor) over [begin, end).
template <class F>
double exp_sum(F value, int64_t begin, int64_t end, float max, float factor) {
    double total = 0;
    for (int64_t strip = begin; strip < end; strip += STRIP) {
        vf sum{};
        for (int64_t i = strip; i < strip + STRIP && i < end; i += VL) sum += vexp((value(i) - max) * factor);
        total += hsum(sum);
    }
    return total;
}

Partial scan(const Row& row, int64_t begin, int64_t end) {
    vi lane = lanes(), best_id = lane + (int32_t)begin, bad{};
    vf best = splat(-INFINITY), raw_max = splat(-INFINITY);
    for (int64_t i = begin; i < end; i += VL) {
        vf x = row.raw(i);
        vi id = lane + (int32_t)i;
        bad |= (((vi)x & 0x7f800000) == 0x7f800000) & (id < (int32_t)row.vocab);
        raw_max = vmax(x, raw_max);
        vf z = row.flags & PENALTIES ? row.penalized(i) : x;
        if (row.mask) z = row.allowed(i, z);
        vi better = z > best;
        best = select(better, z, best);
        best_id = better ? id : best_id;
    }
    Partial p{best[0], best_id[0], hmax(raw_max), 0, 0, 0};
    for (int i = 0; i < VL; i++) {
        p.bad |= bad[i] != 0;
        if (best[i] > p.best || (best[i] == p.best && best_id[i] < p.best_id)) p.best = best[i], p.best_id = best_id[i];
    }
    if (p.bad) return p;
    if (row.wants_sum()) p.raw_sum = exp_sum([&](int64_t i) { return row.raw(i); }, begin, end, p.raw_max, 1.0f);
    if (row.sampled() && !row.greedy() && p.best > -INFINITY)
        p.weight = exp_sum([&](int64_t i) { return row.adjusted(i); }, begin, end, p.best, 1.0f / row.temperature);
    return p;
}

// The blocks of a row, joined in order.
struct Summary {
    float best, raw_max;
    int32_t best_id;
    bool bad;
    double log_sum;  // log of the sum of exp(logit)
    double weight;
};
Summary join(const Call& c, const Row& row, const Partial* p) {
    Summary s{p[0].best, p[0].raw_max, p[0].best_id, false, 0, 0};
    for (int64_t b = 0; b < c.blocks(); b++) {
        s.bad |= p[b].bad != 0;
        if (p[b].best > s.best) s.best = p[b].best, s.best_id = p[b].best_id;
        if (p[b].raw_max > s.raw_max) s.raw_max = p[b].raw_max;
    }
    if (s.bad) return s;
    double sum = 0;
    for (int64_t b = 0; b < c.blocks(); b++) {
        if (row.wants_sum()) sum += p[b].raw_sum * std::exp((double)p[b].raw_max - s.raw_max);
        if (p[b].weight > 0) s.weight += p[b].weight * std::exp(((double)p[b].best - s.best) / row.temperature);
    }
    s.log_sum = s.raw_max + std::log(sum);
    return s;
}

// In [0, 1): see `uniform` in kernels/ops/sample.py.
uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
double uniform(int64_t seed, int64_t position) {
    constexpr uint64_t golden = 0x9e3779b97f4a7c15u;
    return (double)(mix(mix((uint64_t)seed + golden) + (uint64_t)(position + 1) * golden) >> 11) * 0x1p-53;
}

// Inverse CDF over the whole vocabulary: first the block, then the entry in it.
int32_t draw_any(const Call& c, const Row& row, const Partial* p, const Summary& s, double u) {
    double target = u * s.weight, before = 0;
    int64_t block = 0, last = 0;
    for (; block < c.blocks(); block++) {
        if (!(p[block].weight > 0)) continue;
        double weight = p[block].weight * std::exp(((double)p[block].best - s.best) / row.temperature);
        last = block;
        if (before + weight > target) break;
        before += weight;
    }
    if (block == c.blocks()) block = last;
    int32_t chosen = p[block].best_id;
    for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK && i < c.vocab; i += VL) {
        vf w = vexp((row.adjusted(i) - s.best) * (1.0f / row.temperature));
        for (int j = 0; j < VL; j++) {
            if (!(w[j] > 0)) continue;
            chosen = (int32_t)(i + j);
            before += w[j];
            if (before > target) return chosen;
        }
    }
    return chosen;  // rounding left the target a hair beyond the last entry
}

struct Candidate {
    float value, weight;
    int32_t id;
};
// Best first; ties go to the lower id.
bool before(const Candidate& a, const Candidate& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// Candidates with value >= lowest in order of ids; returns how many. `out` has room for one more.
int64_t gather(const Row& row, float lowest, float best, Candidate* out) {
    constexpr int64_t STRIDE = 64;
    float factor = 1.0f / row.temperature;
    int64_t n = 0;
    for (int64_t i = 0; i < row.vocab; i += STRIDE) {
        vf z[STRIDE / VL];
        vf top = splat(-INFINITY);
        int64_t used = 0;
        for (; used < STRIDE / VL && i + used * VL < row.vocab; used++) top = vmax(z[used] = row.adjusted(i + used * VL), top);
        if (!(hmax(top) >= lowest)) continue;
        for (int64_t v = 0; v < used; v++) {
            vf w = vexp((z[v] - best) * factor);
            float value[VL], weight[VL];
            store(value, z[v]);
            store(weight, w);
            int64_t id = i + v * VL, lanes = row.vocab - id < VL ? row.vocab - id : VL;
            for (int64_t j = 0; j < lanes; j++) {
                out[n] = {value[j], weight[j], (int32_t)(id + j)};  // kept or overwritten: no branch to mispredict
                n += value[j] >= lowest;
            }
        }
    }
    return n;
}

double mass(const Candidate* c, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += c[i].weight;
    return total;
}

// Reorders c so that c[0:kept] are the shortest run of best candidates that weighs at least `target`.
int64_t cut_by_mass(Candidate* c, int64_t n, double target) {
    int64_t low = 0, high = n;
    double above = 0;
    while (high - low > 32) {
        int64_t middle = low + (high - low) / 2;
        std::nth_element(c + low, c + middle, c + high, before);
        double half = mass(c + low, middle - low);
        if (above + half < target)
            above += half, low = middle;
        else
            high = middle;
    }
    std::sort(c + low, c + high, before);
    while (low < high && above < target) above += c[low++].weight;
    return low > 0 ? low : 1;
}

int32_t draw_limited(const Row& row, const Summary& s, double u) {
    Candidate* all = (Candidate*)scratch((2 * row.vocab + 1) * sizeof(Candidate));
    Candidate* ranked = all + row.vocab + 1;
    // Values this far below the maximum (after temperature) rarely matter: look further only when they do.
    int64_t n = 0;
    for (float reach : {5.0f, 10.0f, 30.0f, INFINITY}) {
        float lowest = reach == INFINITY ? -INFINITY : s.best - reach * row.temperature;
        n = gather(row, lowest, s.best, all);
        bool enough = row.limits_k()   ? n >= row.top_k
                      : row.limits_p() ? mass(all, n) >= row.top_p * s.weight
                                       : std::exp(-reach) < row.min_p;
        if (enough) break;
    }
    int64_t kept = n;
    std::copy(all, all + n, ranked);
    if (row.limits_k() && row.top_k < n) {
        kept = row.top_k;
        std::nth_element(ranked, ranked + kept, ranked + n, before);
    }
    if (row.limits_p()) kept = cut_by_mass(ranked, kept, row.top_p * (row.limits_k() ? mass(ranked, kept) : s.weight));
    const Candidate worst = *std::max_element(ranked, ranked + kept, before);

    auto keeps = [&](const Candidate& x) { return !before(worst, x) && (x.weight >= row.min_p || x.id == s.best_id); };
    double total = 0;
    for (int64_t i = 0; i < n; i++)
        if (keeps(all[i])) total += all[i].weight;
    double target = u * total, sum = 0;
    int32_t chosen = s.best_id;
    for (int64_t i = 0; i < n && sum <= target; i++)
        if (keeps(all[i]) && all[i].weight > 0) sum += all[i].weight, chosen = all[i].id;
    return chosen;
}

// The `top` largest raw logits, best first.
void top_logprobs(const Row& row, double log_sum, int32_t* ids, float* logprobs) {
    int32_t n = 0, wanted = row.top < TOP ? row.top : TOP;
    float values[TOP];
    for (int64_t i = 0; i < row.vocab && wanted; i += VL) {
        vf x = row.raw(i);
        if (n == wanted && !(hmax(x) > values[n - 1])) continue;
        for (int j = 0; j < VL && i + j < row.vocab; j++) {
            if (n == wanted && !(x[j] > values[n - 1])) continue;
            int32_t at = n < wanted ? n++ : n - 1;
            for (; at > 0 && values[at - 1] < x[j]; at--) values[at] = values[at - 1], ids[at] = ids[at - 1];
            values[at] = x[j];
            ids[at] = (int32_t)(i + j);
        }
    }
    for (int32_t i = 0; i < n; i++) logprobs[i] = (float)(values[i] - log_sum);
}

void finish_row(const Call& c, int64_t r) {
    Row row = c.row(r);
    const Partial* p = c.partial + r * c.blocks();
    Summary s = join(c, row, p);
    for (int i = 0; i < TOP; i++) c.top_ids[r * TOP + i] = -1, c.top_logprobs[r * TOP + i] = NAN;
    c.logprob[r] = NAN;
    c.token[r] = 0;
    c.status[r] = s.bad ? NOT_FINITE : row.mask && s.best == -INFINITY ? NOTHING_ALLOWED : 0;
    if (c.status[r]) return;
    int32_t token = row.target;
    if (row.sampled()) {
        token = s.best_id;
        if (!row.greedy() && s.best > -INFINITY) {
            double u = uniform(c.seed[r], c.positions[c.row_token[r]]);
            token = row.limited() ? draw_limited(row, s, u) : draw_any(c, row, p, s, u);
        }
        c.last_token[c.row_slot[r]] = token;
        c.counts[c.row_slot[r] * c.state_columns + token]++;
    }
    c.token[r] = token;
    if (row.wants_logprob()) c.logprob[r] = (float)(row.logits[token] - s.log_sum);
    if (row.top > 0) top_logprobs(row, s.log_sum, c.top_ids + r * TOP, c.top_logprobs + r * TOP);
}

}  // namespace

HS_EXPORT void hs_sample(const hs_ctx* ctx, const hs_arg* a) {
    enum {
        LIVE, LOGITS, ROW_TOKEN, ROW_SLOT, ROW_TARGET, ROW_FLAGS, ROW_TOP, ROW_MASK, MASKS, TOP_K, TEMPERATURE, TOP_P, MIN_P,
        FREQUENCY, PRESENCE, REPETITION, SEED, POSITIONS, COUNTS, BIAS, LAST_TOKEN, TOKEN, LOGPROBS, TOP_IDS, TOP_LOGPROBS, STATUS,
        WORKSPACE, COLUMNS, VOCAB, STATE_COLUMNS
    };
    Call c;
    c.live = (const int32_t*)a[LIVE].p;
    c.logits = (const float*)a[LOGITS].p;
    c.row_token = (const int32_t*)a[ROW_TOKEN].p;
    c.row_slot = (const int32_t*)a[ROW_SLOT].p;
    c.row_target = (const int32_t*)a[ROW_TARGET].p;
    c.row_flags = (const int32_t*)a[ROW_FLAGS].p;
    c.row_top = (const int32_t*)a[ROW_TOP].p;
    c.row_mask = (const int32_t*)a[ROW_MASK].p;
    c.masks = (const uint32_t*)a[MASKS].p;
    c.top_k = (const int32_t*)a[TOP_K].p;
    c.temperature = (const float*)a[TEMPERATURE].p;
    c.top_p = (const float*)a[TOP_P].p;
    c.min_p = (const float*)a[MIN_P].p;
    c.frequency = (const float*)a[FREQUENCY].p;
    c.presence = (const float*)a[PRESENCE].p;
    c.repetition = (const float*)a[REPETITION].p;
    c.seed = (const int64_t*)a[SEED].p;
    c.positions = (const int32_t*)a[POSITIONS].p;
    c.counts = (int32_t*)a[COUNTS].p;
    c.bias = (const float*)a[BIAS].p;
    c.last_token = (int32_t*)a[LAST_TOKEN].p;
    c.token = (int32_t*)a[TOKEN].p;
    c.logprob = (float*)a[LOGPROBS].p;
    c.top_ids = (int32_t*)a[TOP_IDS].p;
    c.top_logprobs = (float*)a[TOP_LOGPROBS].p;
    c.status = (int32_t*)a[STATUS].p;
    c.partial = (Partial*)a[WORKSPACE].p;
    c.columns = a[COLUMNS].i;
    c.vocab = a[VOCAB].i;
    c.state_columns = a[STATE_COLUMNS].i;

    int64_t rows = c.live[2], blocks = c.blocks();
    if (ctx->phase == 1) {
        for (int64_t r; (r = hs_take(ctx, rows)) >= 0;) finish_row(c, r);
        return;
    }
    for (int64_t i; (i = hs_take(ctx, rows * blocks)) >= 0;) {
        int64_t begin = i % blocks * BLOCK, end = begin + BLOCK < c.vocab ? begin + BLOCK : c.vocab;
        c.partial[i] = scan(c.row(i / blocks), begin, end);
    }
    hs_again(ctx);
}

// Edits in order; a slot belongs to one thread.
HS_EXPORT void hs_edit(const hs_ctx* ctx, const hs_arg* a) {
    enum { LIVE, EDITS, COUNTS, BIAS, COLUMNS };
    enum Kind { CLEAR, MARK, COUNT, SET_BIAS };
    const int32_t* edits = (const int32_t*)a[EDITS].p;
    int64_t columns = a[COLUMNS].i;
    for (int64_t i = 0; i < ((const int32_t*)a[LIVE].p)[3]; i++) {
        const int32_t* edit = edits + i * 4;
        const int32_t slot = edit[0], token = edit[1], value = edit[3];
        if (slot % ctx->threads != ctx->thread) continue;
        int32_t* counts = (int32_t*)a[COUNTS].p + slot * columns;
        float* bias = (float*)a[BIAS].p + slot * columns;
        switch (edit[2]) {
            case CLEAR:
                memset(counts, 0, columns * sizeof(int32_t));
                memset(bias, 0, columns * sizeof(float));
                break;
            case MARK: counts[token] |= SEEN; break;
            case COUNT: counts[token] += value; break;
            case SET_BIAS: memcpy(bias + token, &value, sizeof(float)); break;
        }
    }
}
