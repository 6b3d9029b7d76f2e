/* W0 + B·A, rounded, in one pass over a tile.

   Rounds as loratools/narrowing.py does, and notes the few elements that need its second look: the
   bytes are the same with and without it. Every loop is over a block that stays in a core's first
   cache, and plain enough for the compiler to make vectors of. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 256
#define ROWS 6 /* as many as leave registers free */
#define LANES 8
#define NEAR (1 << 16)
#define INLINE static inline __attribute__((always_inline))

/* The newest instructions that the machine has, chosen when the library is loaded. */
#if !defined(ONE_MACHINE) && defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FOR_EACH_MACHINE                                                                           \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_MACHINE
#endif

typedef double lanes __attribute__((vector_size(8 * LANES), aligned(8)));

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

/* sums += raw; and what float32 makes of them. */
INLINE void add(int dtype, const void *raw, double *sums, float *single, int n) {
    const uint16_t *half = raw;
    if (dtype == SINGLE) {
        memcpy(single, raw, 4 * (size_t)n);
    } else if (dtype == BFLOAT) {
        for (int i = 0; i < n; i++) single[i] = float_of((uint32_t)half[i] << 16);
    } else {
        for (int i = 0; i < n; i++) {
            /* A power of two gives the exponent as float32 counts it, subnormals' too. */
            float size = float_of((uint32_t)(half[i] & 0x7FFF) << 13) * 0x1p112f;
            uint32_t bits = bits_of((half[i] & 0x7C00) == 0x7C00 ? INFINITY : size);
            single[i] = float_of(bits | (uint32_t)(half[i] & 0x8000) << 16);
        }
    }
    for (int i = 0; i < n; i++) {
        sums[i] += (double)single[i];
        single[i] = (float)sums[i];
    }
}

INLINE uint32_t lesser(uint32_t one, uint32_t other) { return one < other ? one : other; }
INLINE uint32_t greater(uint32_t one, uint32_t other) { return one > other ? one : other; }

INLINE int open_in_single(double sum, float single, const notes *to) {
    uint64_t bits;
    double binade, off = fabs(sum - (double)single);
    memcpy(&bits, &sum, 8);
    bits &= 0x7FF0000000000000u;
    memcpy(&binade, &bits, 8);
    binade = binade > 0x1p-126 ? binade : 0x1p-126;
    return off + (4 * to->relative * fabs(sum) + 4 * to->absolute) >= binade * 0x1p-24;
}

INLINE uint16_t as_bfloat(uint32_t bits) {
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE uint32_t apart_in_bfloat(uint32_t bits) { return bits << 16 ^ 0x80000000u; }

INLINE uint16_t as_half(uint32_t bits) {
    uint32_t size = bits & 0x7FFFFFFF;
    uint32_t normal = (size - (112u << 23) + 0xFFF + ((size >> 13) & 1)) >> 13;
    /* Subnormals are whole multiples of 2^-24, which is what float32 keeps beside 1/2. */
    uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3F000000u;
    return (uint16_t)((size >= 113u << 23 ? normal : small) | ((bits >> 16) & 0x8000));
}

INLINE uint32_t apart_in_half(uint32_t size) {
    float off = fabsf(((float_of(size) + 0.5f) - 0.5f) - float_of(size));
    return size >= 113u << 23 ? size << 19 ^ 0x80000000u : bits_of(off) ^ (127u - 25u) << 23;
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

/* How far an element is from where its rounding is in doubt; 0 if it is there. */
INLINE uint32_t apart(int dtype, double sum, float single, const notes *to) {
    if (dtype == SINGLE) return !open_in_single(sum, single, to);
    if (dtype == BFLOAT) return apart_in_bfloat(bits_of(single));
    return apart_in_half(bits_of(single) & 0x7FFFFFFF);
}

/* The block rounded; 0 where a number is not finite, or there is no more room for notes. */
INLINE int finish(int dtype, const double *sums, const float *single, void *out, int n,
                  int64_t place, notes *to) {
    float tiny = (float)(0x1p27 * to->absolute);
    uint32_t most = 0, least = ~0u, nearest = ~0u;
    const uint32_t limit = dtype == SINGLE ? 0x7F800000 : dtype == BFLOAT ? 0x7F7F8000 : 0x477FF000;
    for (int i = 0; i < n; i++) {
        uint32_t bits = bits_of(single[i]), size = bits & 0x7FFFFFFF;
        if (dtype == SINGLE) ((float *)out)[i] = single[i];
        else if (dtype == BFLOAT) ((uint16_t *)out)[i] = as_bfloat(bits);
        else ((uint16_t *)out)[i] = as_half(bits);
        most = greater(most, size);
        least = lesser(least, size);
        nearest = lesser(nearest, apart(dtype, sums[i], single[i], to));
    }
    if (most >= limit) return 0;
    if (nearest && (dtype == SINGLE || least > bits_of(tiny))) return 1;
    for (int i = 0; i < n; i++) {
        int far = dtype == SINGLE || fabsf(single[i]) > tiny;
        if (far && apart(dtype, sums[i], single[i], to)) continue;
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

/* sums (ROWS, BLOCK) = b (ROWS, rank) · a, panel by panel: a panel's product stays in registers. */
INLINE void multiply(const double *const *b, const double *panels, int64_t rank, int count,
                     double *sums) {
    for (int panel = 0; panel < count; panel++, panels += rank * LANES) {
        lanes product[ROWS] = {{0}};
        for (int64_t k = 0; k < rank; k++) {
            lanes a = *(const lanes *)(panels + k * LANES);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) product[row] += b[row][k] * a;
        }
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            *(lanes *)(sums + row * BLOCK + panel * LANES) = product[row];
        }
    }
}

/* out (rows, width) = raw + b (rows, rank) · a, which is in panels (width / LANES, rank, LANES), the
   last one filled with zeros. How many elements `at` and `near` (their float64 sums) have got; -1,
   and nothing of use in `out`, where a number is not finite or more of them need a look than there
   is room for. */
INLINE int64_t fold(int base, int dtype, const char *raw, const double *b, const double *panels,
                    char *out, int64_t rows, int64_t width, int64_t rank, notes to) {
    double sums[ROWS * BLOCK];
    float single[BLOCK];
    const double *some[ROWS];
    int from = base == SINGLE ? 4 : 2, into = dtype == SINGLE ? 4 : 2;
    /* As many columns at a time as leave their part of A in the second cache. */
    int64_t many = NEAR / (rank * BLOCK), step = (many > 1 ? many : 1) * BLOCK;
    for (int64_t left = 0; left < width; left += step) {
        int64_t right = width - left < step ? width : left + step;
        for (int64_t first = 0; first < rows; first += ROWS) {
            for (int i = 0; i < ROWS; i++) { /* the last row stands for those that are not there */
                some[i] = b + (first + i < rows ? first + i : rows - 1) * rank;
            }
            for (int64_t start = left; start < right; start += BLOCK) {
                int n = right - start < BLOCK ? (int)(right - start) : BLOCK;
                multiply(some, panels + start * rank, rank, (n + LANES - 1) / LANES, sums);
                for (int i = 0; i < ROWS && first + i < rows; i++) {
                    int64_t place = (first + i) * width + start;
                    double *here = sums + i * BLOCK;
                    /* The rows after these: too far away for the machine to see them coming. */
                    for (int at = 0; at < n * from; at += 64) {
                        __builtin_prefetch(raw + (place + ROWS * width) * from + at);
                    }
                    for (int at = 0; at < n * into; at += 64) {
                        __builtin_prefetch(out + (place + ROWS * width) * into + at, 1);
                    }
                    add(base, raw + place * from, here, single, n);
                    if (!finish(dtype, here, single, out + place * into, n, place, &to)) return -1;
                }
            }
        }
    }
    return to.found;
}

#define WAY(name, base, dtype)                                                                     \
    FOR_EACH_MACHINE int64_t name(const char *raw, const double *b, const double *panels,          \
                                  char *out, int64_t rows, int64_t width, int64_t rank,            \
                                  double relative, double absolute, int64_t *at, double *near,     \
                                  int64_t capacity) {                                              \
        notes to = {relative, absolute, at, near, 0, capacity};                                    \
        return fold(base, dtype, raw, b, panels, out, rows, width, rank, to);                      \
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
