/* Packing primitives for CPUs. Each does what the torch code of `hf_backrazor.packing` does, to the bit for indices,
 * masks and codes, one row after the other: what a row needs in between stays in the first-level cache.
 *
 * Loops are written for the compiler to vectorise. Where the platform can, functions marked CLONED are compiled for
 * several instruction sets, and the loader takes the best one. What they call is inlined into each. A parallel region
 * may not stand in a CLONED function: compilers outline its body without the clone's instruction set.
 */
#ifndef HF_BACKRAZOR_NATIVE_H
#define HF_BACKRAZOR_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && defined(__gnu_linux__) && \
    !defined(HF_BACKRAZOR_ONE_TARGET)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif

#if defined(__GNUC__)
#define INLINED static inline __attribute__((always_inline))
#else
#define INLINED static inline
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum { NO_INDEX = 0, MASK = 1, POSITIONS = 2, OFFSETS = 3 };
/* Sums run in so many lanes, whatever the vectors' width: the same result on all processors. Compilers leave lanes in
 * memory, where an addition waits for the one before; with 16, the gradient of a batch norm takes half as long again. */
#define LANES 32

/* Loops run over portions of so many elements: a number that the compiler knows leaves no rest to run one by one, which
 * takes as long as all the others where rows are short. A row's last portion goes through a buffer. */
#define PORTION 64

/* Memory is asked for so many bytes ahead, as rows are worked on longer than it takes to read them. Without, packing 8 x
 * 64 x 56 x 56 floats that were last used a while ago takes 0.7 ns an element, with it 0.43. */
#define FETCH_AHEAD 8192
#define LINE 64
#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define PREFETCH(address) ((void)(address))
#endif

enum { DONE = 0, NO_MEMORY = 1 };

/* Places of kept elements within blocks of so many take one byte. */
#define BLOCK 256

/* As `pack_args` and others are mirrored by ctypes structures, all integers are int64. */

/* Sets of elements to be packed. With codes, sets are rows. */
typedef struct {
    const void *x;            /* element (a, b, c, i) at x + a strides[0] + b strides[1] + c strides[2] + i */
    int64_t x_dtype;          /* FLOAT32 or BFLOAT16 */
    int64_t sizes[3];
    int64_t strides[3];
    int64_t n;                /* elements in a set */
    const float *mean;        /* a number for each set, subtracted first; or NULL */
    const float *rstd;        /* a number for each set, multiplied by then; or NULL */
    const uint16_t *centre;   /* bfloat16 (sets / group, n): subtracted; or NULL */
    int64_t group;            /* consecutive sets that share a centre */
    int64_t k;                /* kept exactly, 0 < k < n, or 0 */
    int64_t coding;           /* of their places */
    int64_t value_dtype;      /* of kept values */
    void *values;             /* (sets, k) */
    uint8_t *index;           /* (sets, index_stride) bytes */
    int64_t index_stride;
    int64_t bits;             /* 0 to 4 */
    int64_t even;             /* evenly spaced levels, chosen at the greatest magnitude; else at the mean square */
    const float *thresholds;  /* between the positive levels, for a scale of 1: 2^(bits-1) - 1 of them, ascending */
    const float *levels;      /* the positive levels: 2^(bits-1) of them */
    int64_t rotated;          /* whether what is left is turned before it is coded */
    uint16_t *scale;          /* bfloat16 (sets, 1) */
    uint8_t *fields;          /* (sets, fields_stride) bytes */
    int64_t fields_stride;
    int64_t threads;
} pack_args;

/* Rows to be unpacked. */
typedef struct {
    int64_t rows, n;
    int64_t bits;             /* 0 to 4 */
    const float *levels;      /* what each of the 2^bits codes stands for at a scale of 1 */
    int64_t rotated;          /* whether what they stand for was turned, and is to be turned back */
    const uint16_t *scale;    /* bfloat16 (rows, 1), or NULL: 1 */
    const uint8_t *fields;    /* (rows, fields_stride) bytes */
    int64_t fields_stride;
    int64_t k, coding, value_dtype;
    const void *values;
    const uint8_t *index;
    int64_t index_stride;
    const uint16_t *centre;   /* bfloat16, as in pack_args, of the group that row 0 of this call belongs to; or NULL */
    int64_t group, first;     /* `first`: place of row 0 in its group */
    const float *gain;        /* (rows): multiplied by at the end; or NULL */
    const float *offset;      /* (rows): then added; or NULL */
    float low, high;          /* then limited to these; infinite: not */
    int64_t keep_base;        /* with bits = 0: whether `out` holds what elements not kept are, else they are zero */
    int64_t out_dtype;        /* FLOAT32 or BFLOAT16 */
    int64_t accumulate;       /* 1 or -1: added to what `out` holds, FLOAT32, or subtracted; 0: takes its place */
    void *out;                /* (rows, n) */
    int64_t threads;
} unpack_args;

/* Rows to be sorted into cells of the real line, each by one of a few divisions of it. */
typedef struct {
    const void *x;            /* element (row, i) at x + row stride + i */
    int64_t x_dtype;          /* FLOAT32 or BFLOAT16 */
    int64_t rows, n, stride;
    int64_t bits;             /* 1 to 4 */
    int64_t members;          /* divisions, 1 to 256 */
    const float *bounds;      /* (members - 1): between their mean squares, ascending */
    const float *density;     /* (members): steps in an interval of length 1; half of them lie below zero */
    const uint8_t *starts;    /* (members, 2^bits): the step that each cell begins with, ascending from 0 */
    uint8_t *fields;          /* (rows, fields_stride) bytes */
    int64_t fields_stride;
    uint8_t *member;          /* (rows): whose cells a row's codes number */
    int64_t threads;
} cells_args;

/* What the cells of rows stand for. */
typedef struct {
    int64_t rows, n;
    int64_t bits;             /* 1 to 4 */
    const float *table;       /* (members, 2^bits): a value for each cell */
    const uint8_t *member;    /* (rows), as in cells_args */
    const uint8_t *fields;    /* (rows, fields_stride) bytes */
    int64_t fields_stride;
    int64_t out_dtype;        /* FLOAT32 or BFLOAT16 */
    void *out;                /* (rows, n) */
    int64_t threads;
} values_args;

/* Elements between two bounds, or a gradient that depends on whether they are. */
typedef struct {
    const void *x;            /* (numel): the elements, or the gradient */
    int64_t dtype;            /* FLOAT32 or BFLOAT16, of `x` and `out` */
    int64_t numel;
    float low, high;          /* the bounds; NaN: none */
    float inside, outside;    /* what a gradient is multiplied by */
    uint8_t *bits;            /* (ceil(numel / 8)) */
    void *out;                /* (numel) */
    int64_t threads;
} steps_args;

/* Coded rows to 8-bit integers. */
typedef struct {
    int64_t rows, n;
    int64_t bits;             /* 1 to 4 */
    const int8_t *table;      /* (members, 2^bits): what each code stands for */
    const uint8_t *member;    /* (rows): whose line of the table holds for a row; or NULL: the first */
    const uint8_t *fields;    /* (rows, fields_stride) bytes */
    int64_t fields_stride;
    int64_t k, coding;        /* kept elements become zero */
    const uint8_t *index;
    int64_t index_stride;
    int8_t *out;              /* (rows, n) */
    int64_t threads;
} integers_args;

/* The gradient of a linear layer's output to 8-bit integers, rounded at random to one of the two nearest. */
typedef struct {
    const float *grad;        /* (rows, columns) */
    int64_t rows, columns;
    const uint16_t *row_scale;/* bfloat16 (rows, 1): multiplied by first; or NULL */
    uint64_t seed;            /* below 2^32 */
    int8_t *out;              /* (rows, columns) */
    float *scale;             /* (columns): what a step of `out` stands for */
    float *sum;               /* (columns): the gradient summed over rows */
    int64_t threads;
} round_args;

/* A weight gradient from the product of integers: scaled, with the share of kept elements, gamma and beta. */
typedef struct {
    float *product;           /* (columns, n), or (n, columns) if transposed: the bits of int32, to become floats */
    const float *scale;       /* (columns) */
    const float *grad;        /* (rows, columns) */
    int64_t rows, columns, n;
    int64_t k, coding, value_dtype;
    const void *values;
    const uint8_t *index;
    int64_t index_stride;
    const float *gamma;       /* (n), or NULL */
    const float *beta;        /* (n), or NULL */
    const float *grad_sum;    /* (columns): the gradient summed over rows; needed for beta */
    int64_t transposed;
    int64_t threads;
} gradient_args;

/* LayerNorm's or RMSNorm's gradients from a packed x_hat. */
typedef struct {
    unpack_args x_hat;        /* `out` and `threads` are not read */
    const float *grad;        /* dY, (rows, n) */
    const float *rstd;        /* (rows) */
    const float *gamma;       /* (n), or NULL */
    int64_t centred;          /* LayerNorm; else RMSNorm */
    int64_t block;            /* rows whose share of dgamma and dbeta is summed by itself */
    float *grad_input;        /* (rows, n) */
    float *grad_gamma;        /* (blocks, n) */
    float *grad_beta;         /* (blocks, n) */
    int64_t threads;
} norm_args;

/* The gradients of a batch norm from a packed x_hat, a row for each channel of each sample. */
typedef struct {
    unpack_args x_hat;        /* `out` and `threads` are not read */
    const float *grad;        /* dY, (batch, channels, n) */
    const float *scale;       /* (channels): gamma / deviation */
    int64_t batch, channels;
    int64_t by_batch;         /* normalised by the statistics of the batch; else by fixed ones */
    float *grad_input;        /* (batch, channels, n) */
    float *grad_gamma;        /* (channels) */
    float *grad_beta;         /* (channels) */
    int64_t threads;
} batch_norm_args;

/* Bytes in which positions up to n - 1 are counted: as `position_dtype` in index.py. */
INLINED int64_t position_size(int64_t n) { return n <= 256 ? 1 : n <= 32768 ? 2 : 4; }

INLINED uint32_t bits_of(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

INLINED float float_of(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

INLINED float from_bfloat16(uint16_t b) { return float_of((uint32_t)b << 16); }

/* To nearest, ties to even; NaN stays NaN. */
INLINED uint16_t to_bfloat16(float x) {
    uint32_t b = bits_of(x);
    uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    return (uint16_t)((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* Elements of all portions of a row. */
INLINED int64_t padded(int64_t n) { return (n + PORTION - 1) / PORTION * PORTION; }

INLINED int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Sums of lanes, in pairs: few additions wait for each other. The lanes are changed. */
INLINED float sum_floats(float *restrict lanes) {
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

/* A lane's share of a portion. */
#define SQUARES(type, x, i) ((type)(x)[i] * (type)(x)[i] + (type)(x)[LANES + i] * (type)(x)[LANES + i])

INLINED double sum_doubles(double *restrict lanes) {
    for (int width = LANES / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

/* A portion of floats or bfloat16 to floats, with zeros where it is not full. */
INLINED void load_portion(const void *from, int64_t dtype, int64_t at, int64_t count, float *restrict to) {
    const float *floats = (const float *)from + at;
    const uint16_t *halves = (const uint16_t *)from + at;
    if (count < PORTION) {
        for (int64_t i = 0; i < count; i++) to[i] = dtype == FLOAT32 ? floats[i] : from_bfloat16(halves[i]);
        for (int64_t i = count; i < PORTION; i++) to[i] = 0.0f;
    } else if (dtype == FLOAT32) {
        for (int i = 0; i < PORTION; i++) to[i] = floats[i];
    } else {
        for (int i = 0; i < PORTION; i++) to[i] = from_bfloat16(halves[i]);
    }
}

INLINED void store_portion(const float *restrict from, int64_t count, int64_t dtype, int64_t at, void *to) {
    float *floats = (float *)to + at;
    uint16_t *halves = (uint16_t *)to + at;
    if (count < PORTION) {
        for (int64_t i = 0; i < count; i++) {
            if (dtype == FLOAT32) {
                floats[i] = from[i];
            } else {
                halves[i] = to_bfloat16(from[i]);
            }
        }
    } else if (dtype == FLOAT32) {
        for (int i = 0; i < PORTION; i++) floats[i] = from[i];
    } else {
        for (int i = 0; i < PORTION; i++) halves[i] = to_bfloat16(from[i]);
    }
}

#endif
