/* W0 + B·A, rounded, in one pass over a tile.

   Rounds as loratools/narrowing.py does, and notes the few elements that need its second look: the
   bytes are the same with and without it. Every loop is over a block that stays in a core's first
   cache, and plain enough for the compiler to make vectors of. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 512
#define INLINE static inline __attribute__((always_inline))

/* The newest instructions that the machine has, chosen when the library is loaded. */
#if !defined(ONE_MACHINE) && defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FOR_EACH_MACHINE                                                                           \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_MACHINE
#endif

enum { SINGLE, BFLOAT, HALF };

typedef struct {
    double relative, absolute; /* |float64's sum - the sum| <= relative * |sum| + absolute */
    int64_t *at;
    double *near;
    int64_t found, capacity;
} notes;

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void widen(int dtype, const void *raw, double *wide, int n) {
    const float *single = raw;
    const uint16_t *half = raw;
    if (dtype == SINGLE) {
        for (int i = 0; i < n; i++) wide[i] = single[i];
    } else if (dtype == BFLOAT) {
        for (int i = 0; i < n; i++) wide[i] = float_of((uint32_t)half[i] << 16);
    } else {
        for (int i = 0; i < n; i++) {
            /* A power of two gives the exponent as float32 counts it, subnormals' too. */
            float size = float_of((uint32_t)(half[i] & 0x7FFF) << 13) * 0x1p112f;
            size = (half[i] & 0x7C00) == 0x7C00 ? INFINITY : size;
            wide[i] = half[i] & 0x8000 ? -size : size;
        }
    }
}

/* Each rounds a block; `open` says which elements may be wrong, the result if all are finite. */

INLINE int to_single(const double *sums, float *single, float *out, uint32_t *open, int n,
                     const notes *to) {
    double relative = 4 * to->relative, absolute = 4 * to->absolute;
    uint32_t most = 0;
    for (int i = 0; i < n; i++) out[i] = single[i];
    for (int i = 0; i < n; i++) {
        uint64_t bits;
        double binade, off = fabs(sums[i] - (double)single[i]);
        memcpy(&bits, &sums[i], 8);
        bits &= 0x7FF0000000000000u;
        memcpy(&binade, &bits, 8);
        binade = binade > 0x1p-126 ? binade : 0x1p-126;
        open[i] = off + (relative * fabs(sums[i]) + absolute) >= binade * 0x1p-24;
    }
    for (int i = 0; i < n; i++) {
        uint32_t size = bits_of(single[i]) & 0x7FFFFFFF;
        most = size > most ? size : most;
    }
    return most < 0x7F800000;
}

INLINE uint16_t as_bfloat(uint32_t bits) {
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE int to_bfloat(const float *single, uint16_t *out, uint32_t *open, int n, float tiny) {
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits = bits_of(single[i]), size = bits & 0x7FFFFFFF;
        out[i] = as_bfloat(bits);
        open[i] = (bits << 16 == 0x80000000u) | (fabsf(single[i]) <= tiny);
        most = size > most ? size : most;
    }
    return most < 0x7F7F8000;
}

INLINE uint16_t as_half(uint32_t bits) {
    uint32_t size = bits & 0x7FFFFFFF;
    uint32_t normal = (size - (112u << 23) + 0xFFF + ((size >> 13) & 1)) >> 13;
    /* Subnormals are whole multiples of 2^-24, which is what float32 keeps beside 1/2. */
    uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3F000000u;
    return (uint16_t)((size >= 113u << 23 ? normal : small) | ((bits >> 16) & 0x8000));
}

INLINE int to_half(const float *single, uint16_t *out, uint32_t *open, int n, float tiny) {
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits = bits_of(single[i]), size = bits & 0x7FFFFFFF;
        float off = fabsf(((fabsf(single[i]) + 0.5f) - 0.5f) - fabsf(single[i]));
        uint32_t halfway = size >= 113u << 23 ? bits << 19 == 0x80000000u : off == 0x1p-25f;
        out[i] = as_half(bits);
        open[i] = halfway | (fabsf(single[i]) <= tiny);
        most = size > most ? size : most;
    }
    return most < 0x477FF000;
}

/* One number correctly rounded, by way of a float32 whose last bit says whether more was cut off
   (Boldo & Melquiond 2008, doi:10.1109/TC.2007.70819); its bits. */
INLINE uint32_t rounded(int dtype, double value) {
    float single = (float)value;
    uint32_t bits = bits_of(single);
    if (dtype == SINGLE) return bits;
    bits -= fabs((double)single) > fabs(value);
    bits |= (double)single != value;
    return dtype == BFLOAT ? as_bfloat(bits) : as_half(bits);
}

INLINE int finish(int dtype, const double *sums, void *out, int n, int64_t place, notes *to) {
    float single[BLOCK], tiny = (float)(0x1p27 * to->absolute);
    uint32_t open[BLOCK], hits = 0;
    int finite;
    for (int i = 0; i < n; i++) single[i] = (float)sums[i];
    if (dtype == SINGLE) finite = to_single(sums, single, out, open, n, to);
    else if (dtype == BFLOAT) finite = to_bfloat(single, out, open, n, tiny);
    else finite = to_half(single, out, open, n, tiny);
    if (!finite) return 0;
    for (int i = 0; i < n; i++) hits += open[i];
    for (int i = 0; hits && i < n; i++) {
        if (!open[i]) continue;
        hits--;
        double error = to->relative * fabs(sums[i]) + to->absolute;
        uint32_t low = rounded(dtype, sums[i] - error);
        if (low == rounded(dtype, sums[i] + error)) {
            if (dtype == SINGLE) ((float *)out)[i] = float_of(low);
            else ((uint16_t *)out)[i] = (uint16_t)low;
            continue;
        }
        if (to->found == to->capacity) return 0;
        to->at[to->found] = place + i;
        to->near[to->found++] = sums[i];
    }
    return 1;
}

/* out (rows, width) = raw + b (rows, rank) · a (rank, width); the rank is a multiple of 4. How many
   elements `at` and `near` (their float64 sums) have got; -1, and nothing of use in `out`, where a
   number is not finite or more of them need a look than there is room for. */
INLINE int64_t fold(int base, int dtype, const char *raw, const double *b, const double *a,
                    char *out, int64_t rows, int64_t width, int64_t rank, notes to) {
    double sums[2][BLOCK];
    int from = base == SINGLE ? 4 : 2, into = dtype == SINGLE ? 4 : 2;
    for (int64_t start = 0; start < width; start += BLOCK) {
        int n = width - start < BLOCK ? (int)(width - start) : BLOCK;
        for (int64_t row = 0; row < rows; row += 2) { /* two at a time: A is loaded once for both */
            int64_t other = row + 1 < rows ? row + 1 : row;
            int64_t first = row * width + start, second = other * width + start;
            double *restrict w = sums[0], *restrict v = sums[1];
            widen(base, raw + first * from, w, n);
            widen(base, raw + second * from, v, n);
            for (int64_t k = 0; k < rank; k += 4) {
                const double *restrict p = a + k * width + start, *restrict q = p + width;
                const double *restrict r = q + width, *restrict t = r + width;
                const double *c = b + row * rank + k, *d = b + other * rank + k;
                for (int i = 0; i < n; i++) {
                    w[i] += c[0] * p[i] + c[1] * q[i] + c[2] * r[i] + c[3] * t[i];
                    v[i] += d[0] * p[i] + d[1] * q[i] + d[2] * r[i] + d[3] * t[i];
                }
            }
            if (!finish(dtype, w, out + first * into, n, first, &to)) return -1;
            if (other != row && !finish(dtype, v, out + second * into, n, second, &to)) return -1;
        }
    }
    return to.found;
}

#define WAY(name, base, dtype)                                                                     \
    FOR_EACH_MACHINE int64_t name(const char *raw, const double *b, const double *a, char *out,    \
                                  int64_t rows, int64_t width, int64_t rank, double relative,      \
                                  double absolute, int64_t *at, double *near, int64_t capacity) {  \
        notes to = {relative, absolute, at, near, 0, capacity};                                    \
        return fold(base, dtype, raw, b, a, out, rows, width, rank, to);                           \
    }

WAY(fold_float32_float32, SINGLE, SINGLE)
WAY(fold_float32_bfloat16, SINGLE, BFLOAT)
WAY(fold_float32_float16, SINGLE, HALF)
WAY(fold_bfloat16_float32, BFLOAT, SINGLE)
WAY(fold_bfloat16_bfloat16, BFLOAT, BFLOAT)
WAY(fold_bfloat16_float16, BFLOAT, HALF)
WAY(fold_float16_float32, HALF, SINGLE)
WAY(fold_float16_bfloat16, HALF, BFLOAT)
WAY(fold_float16_float16, HALF, HALF)
