// softmax(q k^T / sqrt(d)) v in bfloat16, by the tiles of AMX: no mask, inference only.
//
// One head's keys and values are packed once and shared by all its blocks of ROWS queries. A block walks over the keys
// in steps of STEP (Dao et al. 2022, arXiv 2205.14135):
//   scores  S = Q K^T             float32, in cache
//   softmax P = 2^(c S - m)       c = log2(e) / sqrt(d), m an integer per row
//   values  O += P [V 1]          the column of ones makes the row sum, so O[d] divides the row
// The keys' tail is padded by copies of the last key (harmless to the maximum) and by zero rows of [V 1], so nothing
// needs a mask.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int ROWS = 64, STEP = 128, MAX_D = 256, MAX_DV = MAX_D + 16;

// If |q||k| c stays below this, 2^(c S) itself neither overflows nor vanishes in float32 or
// bfloat16, and m = 0 will do: no maximum is sought.
constexpr float BOUND = 80;

struct Call {
    const char *q, *k, *v;
    char *out;
    int64_t qs[3], ks[3], vs[3], os[3];  // strides in bytes: batch, head, row
    int64_t heads, n, keys;              // heads per batch, queries, keys
    int d, dk, dv;                       // head size; as padded for the scores; for [V 1]
    int64_t chunks;                      // of 32 keys
    float c;
    // Packed, for the group of heads in work:
    char *kpack, *vpack;
    int64_t kbytes, vbytes;  // per head
    float *norm;             // largest |k|^2 of each chunk
};

inline int64_t at(const int64_t *s, const Call &a, int64_t head, int64_t row) {
    return head / a.heads * s[0] + head % a.heads * s[1] + row * s[2];
}

inline int64_t up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

inline __m512i load_pairs(const char *p, int left) {  // 32 numbers, or the `left` that there are
    return _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0, p);
}

// Transposes 16 x 16 numbers of 32 bits.
inline void transpose(__m512i *x) {
    const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i other = _mm512_set1_epi32(16);
#pragma GCC unroll 4
    for (int s = 1; s < 16; s *= 2) {
        const __m512i bit = _mm512_set1_epi32(s);
        const __mmask16 odd = _mm512_test_epi32_mask(i, bit);
        const __m512i lo = _mm512_mask_add_epi32(i, odd, _mm512_sub_epi32(i, bit), other);
        const __m512i hi = _mm512_mask_add_epi32(_mm512_add_epi32(i, bit), odd, i, other);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            if (!(r & s)) {
                const __m512i a = x[r], b = x[r + s];
                x[r] = _mm512_permutex2var_epi32(a, lo, b);
                x[r + s] = _mm512_permutex2var_epi32(a, hi, b);
            }
    }
}

// Packs 32 keys and values into the tiles that AMX multiplies by: 16 rows of 16 pairs.
//   keys:   per 16 keys, per 32 dimensions: row r, column j holds dimensions 2r, 2r+1 of key j
//   values: per 16 columns: row r holds keys r and r + 16, the pairing that softmax() writes
void pack(const Call &a, int64_t head, int64_t slot, int64_t chunk) {
    const char *k = a.k + at(a.ks, a, head, 0), *v = a.v + at(a.vs, a, head, 0);
    char *kp = a.kpack + slot * a.kbytes + chunk * a.dk * 64;
    char *vp = a.vpack + slot * a.vbytes + chunk * a.dv * 64;
    __m512 largest = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int half = 0; half < 2; half++) {
        __m512 norm = _mm512_setzero_ps();
        for (int e = 0; e < a.dk; e += 32, kp += 1024) {
            __m512i x[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++) {
                const int64_t key = chunk * 32 + half * 16 + j;
                x[j] = load_pairs(k + (key < a.keys ? key : a.keys - 1) * a.ks[2] + e * 2, a.d - e);
            }
            transpose(x);
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++) {
                norm = _mm512_dpbf16_ps(norm, (__m512bh)x[r], (__m512bh)x[r]);
                _mm512_store_si512(kp + r * 64, x[r]);
            }
        }
        bad |= _mm512_cmp_ps_mask(norm, norm, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, norm);
    }
    a.norm[slot * a.chunks + chunk] = bad ? NAN : _mm512_reduce_max_ps(largest);

    for (int r = 0; r < 16; r++) {
        const int64_t key = chunk * 32 + r;
        const char *v0 = v + key * a.vs[2], *v1 = v0 + 16 * a.vs[2];
        for (int e = 0; e < a.dv; e += 16) {
            const int left = a.d - e;
            const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
            const __mmask16 one = left >= 0 && left < 16 ? 1 << left : 0;
            __m256i x[2];
            for (int i = 0; i < 2; i++) {
                const bool real = key + 16 * i < a.keys;
                x[i] = _mm256_maskz_loadu_epi16(real ? some : 0, (i ? v1 : v0) + e * 2);
                x[i] = _mm256_mask_set1_epi16(x[i], real ? one : 0, 0x3f80);
            }
            const __m512i hi = _mm512_slli_epi32(_mm512_cvtepu16_epi32(x[1]), 16);
            _mm512_store_si512(vp + e * 64 + r * 64,
                               _mm512_or_si512(hi, _mm512_cvtepu16_epi32(x[0])));
        }
    }
}

struct alignas(64) Scratch {
    uint16_t q[ROWS * MAX_D];
    float s[2][ROWS][STEP + 16];  // scores and weights: two steps are under way at a time
    uint16_t p[2][ROWS][STEP + 32];
    float o[ROWS][MAX_DV];
    float m[ROWS], shrink[2][ROWS];  // m per row; what it made of older sums
};

// 2^y, plus half a unit of bfloat16 so that cutting off 16 bits rounds. The argument is
// (y + 127) 2^23: as an integer its bits are a float, 2^n (1 + f) for y = n + f. The
// polynomial is the minimax fit to (2^f + 2^-8) / (1 + f); its relative error is 1.1e-4.
inline __m512i exp2_bits(__m512 t) {
    const __m512i i = _mm512_cvtps_epi32(t);
    const __m512 x = (__m512)_mm512_ternarylogic_epi32(i, _mm512_set1_epi32(0x7fffff),
                                                       _mm512_set1_epi32(0x3f800000), 0xea);
    __m512 g = _mm512_set1_ps(0.08302737f);
    g = _mm512_fmadd_ps(g, x, _mm512_set1_ps(-0.60197745f));
    g = _mm512_fmadd_ps(g, x, _mm512_set1_ps(1.79719398f));
    g = _mm512_fmadd_ps(g, x, _mm512_set1_ps(-2.42487936f));
    g = _mm512_fmadd_ps(g, x, _mm512_set1_ps(2.15042965f));
    return (__m512i)_mm512_mul_ps((__m512)i, g);
}

template <bool BOUNDED>
inline void softmax(Scratch &w, int step, int row, int keys, float c) {
    const float *s = w.s[step & 1][row];
    uint16_t *p = w.p[step & 1][row];
    float m = 0;
    if (!BOUNDED) {
        __m512 top = _mm512_load_ps(s);
        for (int j = 16; j < keys; j += 16) top = _mm512_max_ps(top, _mm512_load_ps(s + j));
        const float largest = _mm512_reduce_max_ps(top) * c;
        const float old = step ? w.m[row] : -INFINITY;
        // m may lag behind the maximum: 2^32 is no danger, and the sums are seldom rescaled.
        m = largest > old + 32 ? ceilf(largest) : old;
        w.m[row] = m;
        w.shrink[step & 1][row] = m == old ? 1 : exp2f(old - m);
    }
    const __m512 scale = _mm512_set1_ps(c * 0x1p23f), shift = _mm512_set1_ps((127 - m) * 0x1p23f);
    for (int j = 0; j < keys; j += 32) {
        __m512 t0 = _mm512_fmadd_ps(_mm512_load_ps(s + j), scale, shift);
        __m512 t1 = _mm512_fmadd_ps(_mm512_load_ps(s + j + 16), scale, shift);
        if (!BOUNDED) {
            t0 = _mm512_max_ps(t0, _mm512_set1_ps(0x1p23f));
            t1 = _mm512_max_ps(t1, _mm512_set1_ps(0x1p23f));
        }
        const __m512i low = _mm512_srli_epi32(exp2_bits(t0), 16);
        _mm512_store_si512(p + j, _mm512_mask_blend_epi16(0xaaaaaaaa, low, exp2_bits(t1)));
    }
}

// One chunk of scores: 32 queries x 32 keys. They are stored apart, later: a store would hold up
// what follows it until the product is done.
inline void scores(const Call &a, const uint16_t *q, const char *kp) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int e = 0; e < a.dk; e += 32) {
        _tile_loadd(4, q + e, a.dk * 2);
        _tile_loadd(6, kp + e * 32, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, kp + (a.dk + e) * 32, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, q + 16 * a.dk + e, a.dk * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

inline void store_scores(float *s) {
    constexpr int pitch = (STEP + 16) * 4;
    _tile_stored(0, s, pitch);
    _tile_stored(1, s + 16, pitch);
    _tile_stored(2, s + 4 * pitch, pitch);
    _tile_stored(3, s + 4 * pitch + 16, pitch);
}

// The sums' tiles for up to three tile columns of [V 1]; they move as a whole.
inline void load_sums(float *o, int columns) {
    constexpr int pitch = MAX_DV * 4;
    _tile_loadd(0, o, pitch);
    _tile_loadd(3, o + 16 * MAX_DV, pitch);
    if (columns > 1) {
        _tile_loadd(1, o + 16, pitch);
        _tile_loadd(4, o + 16 * MAX_DV + 16, pitch);
    }
    if (columns > 2) {
        _tile_loadd(2, o + 32, pitch);
        _tile_loadd(5, o + 16 * MAX_DV + 32, pitch);
    }
}

inline void store_sums(float *o, int columns) {
    constexpr int pitch = MAX_DV * 4;
    _tile_stored(0, o, pitch);
    _tile_stored(3, o + 16 * MAX_DV, pitch);
    if (columns > 1) {
        _tile_stored(1, o + 16, pitch);
        _tile_stored(4, o + 16 * MAX_DV + 16, pitch);
    }
    if (columns > 2) {
        _tile_stored(2, o + 32, pitch);
        _tile_stored(5, o + 16 * MAX_DV + 32, pitch);
    }
}

inline void values(const uint16_t *p, const char *vp, int columns) {
    constexpr int pitch = (STEP + 32) * 2;
    _tile_loadd(6, p, pitch);
    _tile_loadd(7, vp, 64);
    _tile_dpbf16ps(0, 6, 7);
    if (columns > 1) {
        _tile_loadd(7, vp + 1024, 64);
        _tile_dpbf16ps(1, 6, 7);
    }
    if (columns > 2) {
        _tile_loadd(7, vp + 2048, 64);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(6, p + 16 * (STEP + 32), pitch);
        _tile_dpbf16ps(5, 6, 7);
    } else {
        _tile_loadd(6, p + 16 * (STEP + 32), pitch);
    }
    if (columns > 1) {
        _tile_loadd(7, vp + 1024, 64);
        _tile_dpbf16ps(4, 6, 7);
    }
    _tile_loadd(7, vp, 64);
    _tile_dpbf16ps(3, 6, 7);
}

// All keys for one block of queries. In each turn the tiles work on the scores of one step and
// the values of the step two before, while the vector unit makes the softmax of the step
// between: a few rows after each piece of tile work, so that both units stay busy.
template <bool BOUNDED>
void walk(const Call &a, Scratch &w, int64_t slot, int used) {
    const char *kp = a.kpack + slot * a.kbytes, *vp = a.vpack + slot * a.vbytes;
    const int steps = up(a.chunks, STEP / 32) / (STEP / 32);
    const auto chunks = [&](int step) {
        return (int)(step < steps - 1 ? STEP / 32 : a.chunks - (int64_t)(steps - 1) * (STEP / 32));
    };
    for (int turn = -1; turn <= steps; turn++) {
        const int next = turn + 1 < steps ? chunks(turn + 1) : 0;
        const int last = turn > 0 ? chunks(turn - 1) : 0;
        const int rows = turn >= 0 && turn < steps ? used : 0;
        const int keys = rows ? chunks(turn) * 32 : 0;
        const int groups = (a.dv / 16 + 2) / 3, pieces = (next + last * groups) * (used / 32);
        int done = 0, row = 0;
        const auto some_rows = [&](bool all) {
            const int to = all ? rows : ++done * rows / pieces;
            for (; row < to; row++) softmax<BOUNDED>(w, turn, row, keys, a.c);
            asm volatile("" ::: "memory");  // the tile loads don't tell the compiler what they read
        };
        for (int i = 0; i < next; i++, kp += a.dk * 64) {
            for (int r = 0; r < used; r += 32) {
                scores(a, w.q + r * a.dk, kp);
                some_rows(false);
                store_scores(&w.s[(turn + 1) & 1][r][i * 32]);
            }
        }
        if (last) {
            const int step = turn - 1;
            if (!BOUNDED && step)
                for (int r = 0; r < used; r++)
                    if (w.shrink[step & 1][r] != 1)
                        for (int e = 0; e < a.dv; e++) w.o[r][e] *= w.shrink[step & 1][r];
            asm volatile("" ::: "memory");
            for (int g = 0; g < groups * (used / 32); g++) {
                const int r = g / groups * 32, column = g % groups * 3;
                const int columns = a.dv / 16 - column < 3 ? a.dv / 16 - column : 3;
                float *o = &w.o[r][column * 16];
                load_sums(o, columns);
                for (int i = 0; i < last; i++) {
                    values(&w.p[step & 1][r][i * 32], vp + i * a.dv * 64 + column * 1024, columns);
                    some_rows(false);
                }
                store_sums(o, columns);
            }
            vp += last * a.dv * 64;
        }
        some_rows(true);
    }
}

void enter() {
    static const struct alignas(64) Config {  // static: the intrinsic doesn't say that it reads it all
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

void block(const Call &a, int64_t head, int64_t slot, int64_t row) {
    Scratch w;
    const int rows = a.n - row < ROWS ? a.n - row : ROWS;
    const int used = up(rows, 32);  // whole tiles
    float longest = 0, norm[ROWS];
    for (int64_t i = 0; i < a.chunks; i++) {
        const float x = a.norm[slot * a.chunks + i];
        longest = x <= longest ? longest : x;
        if (x != x) break;
    }
    bool bounded = true;
    for (int r = 0; r < used; r++) {
        __m512 sum = _mm512_setzero_ps();
        const char *q = a.q + at(a.qs, a, head, row + (r < rows ? r : 0));
        for (int e = 0; e < a.dk; e += 32) {
            const __m512i x = load_pairs(q + e * 2, r < rows ? a.d - e : 0);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x);
            _mm512_store_si512(w.q + r * a.dk + e, x);
        }
        norm[r] = _mm512_reduce_add_ps(sum) * a.c * a.c * longest;
        bounded &= norm[r] <= BOUND * BOUND;
    }
    for (int r = 0; r < used; r++) memset(w.o[r], 0, a.dv * 4);
    if (bounded)
        walk<true>(a, w, slot, used);
    else
        walk<false>(a, w, slot, used);
    for (int r = 0; r < rows; r++) {
        char *out = a.out + at(a.os, a, head, row + r);
        // The exponential drops NaN; q and k have one if the norm does.
        const __m512 inv = _mm512_set1_ps(norm[r] != norm[r] ? NAN : 1 / w.o[r][a.d]);
        for (int e = 0; e < a.d; e += 16)
            _mm256_mask_storeu_epi16(
                out + e * 2, a.d - e >= 16 ? 0xffff : 0xff,
                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(&w.o[r][e]), inv)));
    }
}

// Linux hands the tiles out on request.
bool has_tiles() {
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl's
    static const bool given = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return given;
}

}  // namespace

// q (batch, heads, n, d), k and v (batch, heads, keys, d) and out like q, of bfloat16; d is a multiple of 8. Strides in
// elements: batch, head, row. Returns 0, or 1: no tiles here, 2: a shape that is not supported, 3: no memory.
extern "C" int calotype_attention(const void *q, const void *k, const void *v, void *out, int64_t batch,
                                  int64_t heads, int64_t n, int64_t keys, int64_t d, const int64_t *qs,
                                  const int64_t *ks, const int64_t *vs, const int64_t *os, int threads) {
    if (!has_tiles()) return 1;
    if (d < 8 || d > MAX_D || d % 8 || keys < 1) return 2;
    Call a = {};
    a.q = (const char *)q, a.k = (const char *)k, a.v = (const char *)v, a.out = (char *)out;
    for (int i = 0; i < 3; i++) a.qs[i] = 2 * qs[i], a.ks[i] = 2 * ks[i], a.vs[i] = 2 * vs[i], a.os[i] = 2 * os[i];
    a.heads = heads, a.n = n, a.keys = keys;
    a.d = d, a.dk = up(d, 32), a.dv = up(d + 1, 16);
    a.chunks = up(keys, 32) / 32;
    a.c = 1.44269504f / sqrtf(d);
    a.kbytes = a.chunks * 64 * a.dk;
    a.vbytes = a.chunks * 64 * a.dv;

    // As many heads at a time as 16 MB hold, but at least one. The buffer stays for the next call:
    // fresh memory costs more than packing.
    const int64_t all = batch * heads, per = a.kbytes + a.vbytes + up(a.chunks * 4, 64);
    int64_t group = (16 << 20) / per;
    group = group < 1 ? 1 : group > all ? all : group;
    static thread_local struct Buffer {
        char *p = nullptr;
        int64_t size = 0;
        ~Buffer() { free(p); }
    } buffer;
    const int64_t size = up(group * per, 2 << 20);  // whole huge pages: fewer TLB misses
    if (buffer.size < size) {
        free(buffer.p);
        buffer.size = 0;
        buffer.p = (char *)aligned_alloc(2 << 20, size);
        if (!buffer.p) return 3;
        madvise(buffer.p, size, MADV_HUGEPAGE);
        buffer.size = size;
    }
    a.kpack = buffer.p;
    a.vpack = a.kpack + group * a.kbytes;
    a.norm = (float *)(a.vpack + group * a.vbytes);

    const int64_t blocks = up(n, ROWS) / ROWS;
#pragma omp parallel num_threads(threads)
    {
        enter();
        for (int64_t first = 0; first < all; first += group) {
            const int64_t count = all - first < group ? all - first : group;
#pragma omp for schedule(dynamic, 4)
            for (int64_t i = 0; i < count * a.chunks; i++) pack(a, first + i / a.chunks, i / a.chunks, i % a.chunks);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < count * blocks; i++)
                block(a, first + i / blocks, i / blocks, i % blocks * ROWS);
        }
        _tile_release();
    }
    return 0;
}
