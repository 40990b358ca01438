/* The k greatest magnitudes of each set exactly, and codes with one scale for what is left over. */
#include <math.h>

#include "fields.h"
#include "native.h"

typedef struct {
    float *x;       /* the set */
    uint8_t *keep;  /* 1 for what is kept */
    uint8_t *codes;
    uint8_t *plane;
} scratch;

INLINED uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }

/* Magnitudes as integers: their order is that of the numbers, with NaN above infinity. */
INLINED int64_t count_at_least(const float *restrict x, int64_t n, uint32_t bound) {
    int64_t total = 0;
    for (int64_t start = 0; start < n; start += 1 << 20) {
        int32_t count = 0;
        int64_t stop = smaller(n, start + (1 << 20));
        for (int64_t i = start; i < stop; i++) count += (int32_t)magnitude(x[i]) >= (int32_t)bound;
        total += count;
    }
    return total;
}

INLINED uint32_t greatest_magnitude(const float *restrict x, int64_t n) {
    int32_t greatest = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t m = (int32_t)magnitude(x[i]);
        greatest = m > greatest ? m : greatest;
    }
    return (uint32_t)greatest;
}

/* Mark k of n: those of at least `*guess`, which becomes a bound for this set and is a good start for the next; of
 * equal magnitudes, those that come first. 0 < k < n. */
INLINED void select_greatest(const float *restrict x, int64_t n, int64_t k, uint32_t *guess, uint8_t *restrict keep) {
    uint32_t low = 0, high = 0x80000000u; /* count_at_least(low) >= k > count_at_least(high) */
    uint32_t bound = *guess;
    int64_t above = 0, count = 0;
    if (k == 1) {
        low = greatest_magnitude(x, n), high = low + 1;
    } else {
        uint32_t step = 1u << 18;
        for (int found = 0; !found && high - low > 1;) {
            count = count_at_least(x, n, bound);
            if (count == k) {
                low = bound, found = 1;
            } else if (count > k) {
                low = bound;
            } else {
                high = bound, above = count;
            }
            /* From the guess in growing steps until the bound lies between, then by halves. */
            if (found) break;
            if (high == 0x80000000u) {
                bound = high - low > step ? low + step : low + (high - low) / 2;
                if (step < 1u << 30) step *= 4;
            } else if (low == 0) {
                bound = high > step ? high - step : high / 2;
                if (step < 1u << 30) step *= 4;
            } else {
                bound = low + (high - low) / 2;
            }
        }
        *guess = low;
        if (count_at_least(x, n, low) == k) {
            for (int64_t i = 0; i < n; i++) keep[i] = (int32_t)magnitude(x[i]) >= (int32_t)low;
            return;
        }
        above = count_at_least(x, n, high);
    }
    for (int64_t i = 0; i < n; i++) keep[i] = (int32_t)magnitude(x[i]) >= (int32_t)high;
    int64_t vacant = k - above;
    for (int64_t i = 0; vacant > 0; i++) {
        if (magnitude(x[i]) == low) {
            keep[i] = 1;
            vacant--;
        }
    }
}

INLINED void store_number(uint8_t *to, int64_t i, int64_t size, uint32_t number) {
    uint16_t half = (uint16_t)number;
    uint8_t byte = (uint8_t)number;
    if (size == 4) {
        memcpy(to + 4 * i, &number, 4);
    } else if (size == 2) {
        memcpy(to + 2 * i, &half, 2);
    } else {
        to[i] = byte;
    }
}

INLINED void store_value(const pack_args *a, int64_t at, float x) {
    if (a->value_dtype == FLOAT32) {
        ((float *)a->values)[at] = x;
    } else if (a->value_dtype == BFLOAT16) {
        ((uint16_t *)a->values)[at] = to_bfloat16(x);
    } else {
#ifdef __FLT16_MAX__
        ((_Float16 *)a->values)[at] = (_Float16)x;
#endif
    }
}

/* Values and places of what is kept, in ascending order. */
INLINED void emit_kept(const pack_args *a, int64_t set, const scratch *s) {
    uint8_t *index = a->index + set * a->index_stride;
    int64_t n = a->n, found = 0, at = set * a->k;
    int64_t blocks = a->coding == OFFSETS ? (n - 1) / BLOCK : 0;
    int64_t size = a->coding == OFFSETS ? position_size(a->k + 1) : position_size(n);
    uint8_t *offsets = index + blocks * size;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t stop = smaller(n, start + BLOCK);
        for (int64_t i = start; i < stop; i += 8) {
            uint64_t eight; /* `keep` is zero for SLACK elements beyond n */
            memcpy(&eight, s->keep + i, 8);
            while (eight) {
#if defined(__GNUC__)
                int64_t j = i + __builtin_ctzll(eight) / 8;
#else
                int64_t j = i;
                for (uint64_t rest = eight; !(rest & 1); rest >>= 8) j++;
#endif
                eight &= eight - 1;
                store_value(a, at + found, s->x[j]);
                if (a->coding == OFFSETS) {
                    offsets[found] = (uint8_t)(j - start);
                } else if (a->coding == POSITIONS) {
                    store_number(index, found, size, (uint32_t)j);
                }
                found++;
            }
        }
        if (a->coding == OFFSETS && start / BLOCK < blocks) store_number(index, start / BLOCK, size, (uint32_t)found);
    }
    if (a->coding == MASK) pack_1(s->keep, n, index);
}

INLINED double sum_of_squares(const float *restrict x, int64_t n) {
    double lanes[LANES] = {0}, sum = 0;
    int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        for (int64_t j = 0; j < LANES; j++) lanes[j] += (double)x[i + j] * (double)x[i + j];
    }
    for (int64_t i = whole; i < n; i++) lanes[i - whole] += (double)x[i] * (double)x[i];
    for (int64_t j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* Sign and magnitude: the number of thresholds below |x|, and 2^(bits-1) for a negative x. */
INLINED void count_thresholds(const float *restrict x, int64_t n, int64_t bits, const float *restrict thresholds,
                              float scale, uint8_t *restrict codes) {
    float t[7];
    int64_t count = ((int64_t)1 << (bits - 1)) - 1;
    for (int64_t j = 0; j < count; j++) t[j] = thresholds[j] * scale;
#define SIGN(i) (bits_of(x[i]) >> 31 << (bits - 1))
#define OVER(i, j) (float_of(magnitude(x[i])) > t[j] ? 1u : 0u)
    if (bits == 1) {
        for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)SIGN(i);
    } else if (bits == 2) {
        for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(SIGN(i) + OVER(i, 0));
    } else if (bits == 3) {
        for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(SIGN(i) + OVER(i, 0) + OVER(i, 1) + OVER(i, 2));
    } else {
        for (int64_t i = 0; i < n; i++)
            codes[i] = (uint8_t)(SIGN(i) + OVER(i, 0) + OVER(i, 1) + OVER(i, 2) + OVER(i, 3) + OVER(i, 4) + OVER(i, 5) +
                                 OVER(i, 6));
    }
#undef OVER
#undef SIGN
}

INLINED void emit_codes(const pack_args *a, int64_t set, const scratch *s) {
    int64_t n = a->n;
    float scale;
    if (a->k) {
        for (int64_t i = 0; i < n; i++) s->x[i] = s->keep[i] ? 0.0f : s->x[i];
    }
    if (a->even) {
        scale = float_of(greatest_magnitude(s->x, n));
    } else {
        scale = (float)sqrt(sum_of_squares(s->x, n) / (double)(n - a->k));
    }
    a->scale[set] = to_bfloat16(scale);
    count_thresholds(s->x, n, a->bits, a->thresholds, from_bfloat16(a->scale[set]), s->codes);
    pack_codes(s->codes, n, a->bits, s->plane, a->fields + set * a->fields_stride);
}

INLINED void load_set(const pack_args *a, int64_t set, float *restrict to) {
    int64_t n = a->n, half = a->x_dtype == BFLOAT16;
    int64_t inner = set % a->sizes[2], middle = set / a->sizes[2] % a->sizes[1], outer = set / a->sizes[2] / a->sizes[1];
    int64_t offset = outer * a->strides[0] + middle * a->strides[1] + inner * a->strides[2];
    if (half) {
        const uint16_t *x = (const uint16_t *)a->x + offset;
        for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(x[i]);
    } else {
        memcpy(to, (const float *)a->x + offset, (size_t)n * 4);
    }
    if (a->mean) {
        float mean = a->mean[set];
        for (int64_t i = 0; i < n; i++) to[i] -= mean;
    }
    if (a->rstd) {
        float rstd = a->rstd[set];
        for (int64_t i = 0; i < n; i++) to[i] *= rstd;
    }
    if (a->centre) {
        const uint16_t *centre = a->centre + set / a->group * n;
        for (int64_t i = 0; i < n; i++) to[i] -= from_bfloat16(centre[i]);
    }
    if (half && (a->rstd || a->centre)) {
        /* As torch would round what it had computed. */
        for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(to_bfloat16(to[i]));
    }
}

CLONED static void pack_sets(const pack_args *a, int64_t first, int64_t last, const scratch *s) {
    uint32_t guess = 0x3f800000u; /* 1.0 */
    for (int64_t set = first; set < last; set++) {
        load_set(a, set, s->x);
        if (a->k) {
            select_greatest(s->x, a->n, a->k, &guess, s->keep);
            emit_kept(a, set, s);
        }
        if (a->bits) emit_codes(a, set, s);
    }
}

EXPORTED int64_t hf_backrazor_pack(const pack_args *a) {
    int64_t sets = a->sizes[0] * a->sizes[1] * a->sizes[2], n = a->n, failed = 0;
    int64_t threads = smaller(a->threads, sets);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static) reduction(+ : failed)
#endif
    for (int64_t t = 0; t < threads; t++) {
        size_t bytes = (size_t)(n + SLACK);
        uint8_t *memory = calloc(bytes, 4 + 3);
        if (!memory) {
            failed++;
            continue;
        }
        scratch s = {(float *)(void *)memory, memory + 4 * bytes, memory + 5 * bytes, memory + 6 * bytes};
        pack_sets(a, sets * t / threads, sets * (t + 1) / threads, &s);
        free(memory);
    }
    return failed ? NO_MEMORY : DONE;
}
