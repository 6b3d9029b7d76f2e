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
#define NEAR (1 << 16) /* numbers of A in float64 that stay in the second cache */
#define SINGLES 16
#define CHUNK 8 /* products that are added before they are added to others: a short chain errs less */
#define FEW 4096
#define INLINE static inline __attribute__((always_inline))

/* The newest instructions that the machine has, chosen when the library is loaded. */
#if !defined(ONE_MACHINE) && defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define FOR_EACH_MACHINE                                                                           \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_MACHINE
#endif

typedef double lanes __attribute__((vector_size(8 * LANES), aligned(8)));
typedef float singles __attribute__((vector_size(4 * SINGLES), aligned(4)));

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

INLINE void widen(int dtype, const void *raw, float *single, int n) {
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

/* From here on sizes round to what is not finite. */
INLINE uint32_t limit_of(int dtype) {
    return dtype == SINGLE ? 0x7F800000 : dtype == BFLOAT ? 0x7F7F8000 : 0x477FF000;
}

/* One element rounded, or noted; 0 where it is not finite, or there is no more room for notes. */
INLINE int settle(int dtype, double sum, void *out, int i, int64_t place, notes *to) {
    double error = to->relative * fabs(sum) + to->absolute;
    uint32_t low = rounded(dtype, sum - error);
    if (!(fabs(sum) + error < (double)float_of(limit_of(dtype)))) return 0;
    if (low == rounded(dtype, sum + error)) {
        if (dtype == SINGLE) ((float *)out)[i] = float_of(low);
        else ((uint16_t *)out)[i] = (uint16_t)low;
        return 1;
    }
    if (to->found == to->capacity) return 0;
    to->at[to->found] = place + i;
    to->near[to->found++] = sum;
    return 1;
}

/* The block raw + sums rounded; 0 where a number is not finite, or there is no room for notes. */
INLINE int finish(int base, int dtype, const void *raw, double *sums, void *out, int n,
                  int64_t place, notes *to) {
    float single[BLOCK], tiny = (float)(0x1p27 * to->absolute);
    uint32_t most = 0, least = ~0u, nearest = ~0u;
    widen(base, raw, single, n);
    for (int i = 0; i < n; i++) {
        sums[i] += (double)single[i];
        single[i] = (float)sums[i];
    }
    for (int i = 0; i < n; i++) {
        uint32_t bits = bits_of(single[i]), size = bits & 0x7FFFFFFF;
        if (dtype == SINGLE) ((float *)out)[i] = single[i];
        else if (dtype == BFLOAT) ((uint16_t *)out)[i] = as_bfloat(bits);
        else ((uint16_t *)out)[i] = as_half(bits);
        most = greater(most, size);
        least = lesser(least, size);
        nearest = lesser(nearest, apart(dtype, sums[i], single[i], to));
    }
    if (most >= limit_of(dtype)) return 0;
    if (nearest && (dtype == SINGLE || least > bits_of(tiny))) return 1;
    for (int i = 0; i < n; i++) {
        int far = dtype == SINGLE || fabsf(single[i]) > tiny;
        if (far && apart(dtype, sums[i], single[i], to)) continue;
        if (!settle(dtype, sums[i], out, i, place, to)) return 0;
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

INLINE void multiply_short(const float *const *b, const float *panels, int64_t rank, int count,
                           float *sums) {
    for (int panel = 0; panel < count; panel++, panels += rank * SINGLES) {
        singles whole[ROWS] = {{0}};
        for (int64_t chunk = 0; chunk < rank; chunk += CHUNK) {
            singles product[ROWS] = {{0}};
#pragma GCC unroll 8
            for (int k = 0; k < CHUNK; k++) {
                singles a = *(const singles *)(panels + (chunk + k) * SINGLES);
#pragma GCC unroll 6
                for (int row = 0; row < ROWS; row++) product[row] += b[row][chunk + k] * a;
            }
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; row++) whole[row] += product[row];
        }
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            *(singles *)(sums + row * BLOCK + panel * SINGLES) = whole[row];
        }
    }
}

/* Rows that come next: too far away for the machine to see them coming. */
INLINE void fetch(const char *at, int count, int written) {
    for (int i = 0; i < count; i += 64) {
        if (written) __builtin_prefetch(at + i, 1);
        else __builtin_prefetch(at + i);
    }
}

/* out (rows, width) = raw + b (rows, rank) · a, which is in panels (width / LANES, rank, LANES), the
   last one filled with zeros. How many elements `at` and `near` (their float64 sums) have got; -1,
   and nothing of use in `out`, where a number is not finite or more of them need a look than there
   is room for. */
INLINE int64_t fold(int base, int dtype, const char *raw, const double *b, const double *panels,
                    char *out, int64_t rows, int64_t width, int64_t rank, notes to) {
    double sums[ROWS * BLOCK];
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
                    fetch(raw + (place + ROWS * width) * from, n * from, 0);
                    fetch(out + (place + ROWS * width) * into, n * into, 1);
                    const char *w0 = raw + place * from;
                    if (!finish(base, dtype, w0, here, out + place * into, n, place, &to)) return -1;
                }
            }
        }
    }
    return to.found;
}

/* What a block of float32 left open, in float64, whose error is bounded too. */
INLINE int recompute(const uint32_t *open, const float *w0, const double *b, const float *panels,
                     int64_t rank, int64_t padded, void *out, int n, int64_t place, notes *to) {
    for (int group = 0; group < n; group += SINGLES) {
        uint32_t any = 0;
        for (int i = 0; i < SINGLES; i++) any |= open[group + i];
        for (int i = group; any && i < group + SINGLES && i < n; i++) {
            const float *a = panels + group * padded + (i - group);
            double even = 0, odd = 0; /* two chains, because one would wait for itself */
            if (!open[i]) continue;
            for (int64_t k = 0; k + 1 < rank; k += 2) {
                even += b[k] * (double)a[k * SINGLES];
                odd += b[k + 1] * (double)a[(k + 1) * SINGLES];
            }
            if (rank % 2) even += b[rank - 1] * (double)a[(rank - 1) * SINGLES];
            if (!settle(BFLOAT, (double)w0[i] + (even + odd), out, i, place, to)) return 0;
        }
    }
    return 1;
}

/* `fold` into bfloat16 with the product in float32: `longest` of a row times `wide` of a column
   bounds what that may be off, and where a rounding lies so near float64 decides. B stands there in
   both (`near_b` with its rank filled with zeros to `padded`, a multiple of CHUNK), A in float32
   exactly, in panels (width / SINGLES, padded, SINGLES). -2 where so much is open that float64 is
   faster. Halves are too fine for it: one in a hundred would be open. */
INLINE int64_t fold_short(int base, const char *raw, const double *b, const float *near_b,
                          const float *panels, const float *longest, const float *wide,
                          uint16_t *out, int64_t rows, int64_t width, int64_t rank, int64_t padded,
                          notes to) {
    float sums[ROWS * BLOCK], w0[BLOCK];
    uint32_t open[BLOCK] = {0};
    const float *some[ROWS];
    int from = base == SINGLE ? 4 : 2;
    int64_t met = 0, seen = 0, many = 2 * NEAR / (padded * BLOCK);
    int64_t step = (many > 1 ? many : 1) * BLOCK;
    for (int64_t left = 0; left < width; left += step) {
        int64_t right = width - left < step ? width : left + step;
        for (int64_t first = 0; first < rows; first += ROWS) {
            for (int i = 0; i < ROWS; i++) {
                some[i] = near_b + (first + i < rows ? first + i : rows - 1) * padded;
            }
            for (int64_t start = left; start < right; start += BLOCK) {
                int n = right - start < BLOCK ? (int)(right - start) : BLOCK;
                const float *here = panels + start * padded;
                multiply_short(some, here, padded, (n + SINGLES - 1) / SINGLES, sums);
                for (int row = 0; row < ROWS && first + row < rows; row++) {
                    int64_t place = (first + row) * width + start;
                    uint16_t *into = out + place;
                    uint32_t most = 0, hits = 0;
                    fetch(raw + (place + ROWS * width) * from, n * from, 0);
                    fetch((char *)(into + ROWS * width), n * 2, 1);
                    widen(base, raw + place * from, w0, n);
                    for (int i = 0; i < n; i++) {
                        float sum = w0[i] + sums[row * BLOCK + i];
                        uint32_t bits = bits_of(sum), size = bits & 0x7FFFFFFF;
                        float middle = float_of((bits & 0x7FFF0000) | 0x8000);
                        float error = longest[first + row] * wide[start + i];
                        error += float_of(size) * 0x1.1p-24f;
                        /* An eighth of the last place: other middles are farther away. */
                        float room = float_of(bits & 0x7F800000) * 0x1p-10f;
                        into[i] = as_bfloat(bits);
                        open[i] = !(fabsf(float_of(size) - middle) > error) | !(room > error);
                        /* So small, float32 may have lost more than that, or a zero's sign. */
                        open[i] |= size < 67u << 23;
                        most = greater(most, size);
                        hits += open[i];
                    }
                    if (most >= limit_of(BFLOAT)) return -1;
                    seen += n;
                    met += hits;
                    if (met > FEW + seen / 32) return -2;
                    if (hits && !recompute(open, w0, b + (first + row) * rank, here, rank, padded,
                                           into, n, place, &to)) return -1;
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

#define SHORT(name, base)                                                                          \
    FOR_EACH_MACHINE int64_t name(                                                                 \
        const char *raw, const double *b, const float *near_b, const float *panels,                \
        const float *longest, const float *wide, uint16_t *out, int64_t rows, int64_t width,       \
        int64_t rank, int64_t padded, double relative, double absolute, int64_t *at,               \
        double *near, int64_t capacity) {                                                          \
        notes to = {relative, absolute, at, near, 0, capacity};                                    \
        return fold_short(base, raw, b, near_b, panels, longest, wide, out, rows, width, rank,     \
                          padded, to);                                                             \
    }

SHORT(short_float32, SINGLE)
SHORT(short_bfloat16, BFLOAT)
SHORT(short_float16, HALF)
