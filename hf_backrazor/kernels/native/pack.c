/* The k greatest magnitudes of each set exactly, and codes with one scale for what is left over. */
#include <math.h>

#include "avx512.h"
#include "fields.h"
#include "native.h"
#include "rotation.h"

/* Lists are read and written in steps of so many, and have room for one more. */
enum { LIST_STEP = 16 };

/* So many are found one after the other. */
enum { FEW = 3 };

/* What is needed of a set. Places and their magnitudes are those of elements that may be among the k greatest. */
typedef struct {
    float *x; /* the set, with zeros up to a full portion */
    uint32_t *places;
    uint32_t *magnitudes;
    int avx512; /* whether the processor has it */
} scratch;

/* No magnitude reaches this. */
#define ABOVE_ALL 0x80000000u

INLINED uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }

/* Magnitudes as integers: their order is that of the numbers, with NaN above infinity. Of a set, up to full portions. */
INLINED int64_t count_at_least(const float *restrict x, int64_t n, uint32_t bound) {
    int64_t total = 0;
    for (int64_t start = 0, stop; start < padded(n); start = stop) {
        int32_t count = 0;
        stop = smaller(padded(n), start + (1 << 20));
        for (int64_t i = start; i < stop; i++) count += (int32_t)magnitude(x[i]) >= (int32_t)bound;
        total += count;
    }
    return total;
}

/* The greatest magnitude that is not above `most`, or zero. */
INLINED uint32_t greatest_up_to(const float *restrict x, int64_t n, uint32_t most) {
    int32_t greatest = 0;
    for (int64_t i = 0; i < padded(n); i++) {
        const int32_t m = (int32_t)magnitude(x[i]), counted = m <= (int32_t)most ? m : 0;
        greatest = counted > greatest ? counted : greatest;
    }
    return (uint32_t)greatest;
}

INLINED float root_mean_square(const float *restrict x, int64_t n) {
    float lanes[LANES] = {0};
    for (int64_t start = 0; start < n; start += PORTION) {
        for (int i = 0; i < LANES; i++) lanes[i] += SQUARES(float, x + start, i);
    }
    return sqrtf(sum_floats(lanes) / (float)n);
}

/* A bound that at least k magnitudes reach, and hardly more than twice as many, unless these are equal. The search begins
 * at `*ratio` times the root mean square, and leaves the ratio that it ends at. */
INLINED uint32_t find_bound(const float *restrict x, int64_t n, int64_t k, float *ratio) {
    if (k <= FEW) {
        uint32_t greatest = ABOVE_ALL;
        do {
            greatest = greatest_up_to(x, n, greatest - 1);
        } while (k > 1 && count_at_least(x, n, greatest) < k);
        return greatest;
    }
    const float rms = root_mean_square(x, n);
    uint32_t low = 0, high = ABOVE_ALL, bound = magnitude(rms * *ratio), step = 1u << 18;
    while (high - low > 1) {
        int64_t count = count_at_least(x, n, bound);
        if (count >= k) {
            low = bound;
            if (count <= 2 * k + LIST_STEP) break;
        } else {
            high = bound;
        }
        /* In growing steps until a bound lies on either side, then by halves. */
        if (high == ABOVE_ALL) {
            bound = high - low > step ? low + step : low + (high - low) / 2;
        } else if (low == 0) {
            bound = high > step ? high - step : high / 2;
        } else {
            bound = low + (high - low) / 2;
        }
        if (step < 1u << 30) step *= 4;
    }
    if (rms > 0.0f && float_of(low) < INFINITY) *ratio = float_of(low) / rms;
    return low;
}

/* Places of magnitudes that reach the bound, in ascending order, and how many. */
INLINED int64_t find_candidates(int64_t n, uint32_t bound, const scratch *s) {
    int64_t found = 0;
    for (int64_t start = 0; start < n; start += PORTION) {
        uint8_t marks[PORTION];
        for (int i = 0; i < PORTION; i++) marks[i] = (int32_t)magnitude(s->x[start + i]) >= (int32_t)bound;
        for (int i = 0; i < PORTION; i += 8) {
            uint64_t eight;
            memcpy(&eight, marks + i, 8);
            while (eight) {
#if defined(__GNUC__)
                int64_t j = start + i + __builtin_ctzll(eight) / 8;
#else
                int64_t j = start + i;
                for (uint64_t rest = eight; !(rest & 1); rest >>= 8) j++;
#endif
                eight &= eight - 1;
                if (j >= n) break; /* of the zeros there, if the bound is zero */
                s->magnitudes[found] = magnitude(s->x[j]);
                s->places[found++] = (uint32_t)j;
            }
        }
    }
    return found;
}

/* Of `count` candidates, all of at least `low`, leave the k greatest; of equal magnitudes, those that come first. */
INLINED void keep_greatest(int64_t count, int64_t k, uint32_t low, const scratch *s) {
    uint32_t *magnitudes = s->magnitudes;
    int32_t greatest = 0;
    int64_t reach_low = count, reach_high = 0, kept = 0;
    if (count == k) return;
    for (int i = 0; i < LIST_STEP; i++) magnitudes[count + i] = 0; /* up to whole vectors */
    for (int64_t i = 0; i < count; i += LIST_STEP) {
        for (int j = 0; j < LIST_STEP; j++) {
            greatest = (int32_t)magnitudes[i + j] > greatest ? (int32_t)magnitudes[i + j] : greatest;
        }
    }
    uint32_t high = (uint32_t)greatest + 1; /* at least k reach `low`, fewer reach `high` */
    while (reach_low != k && high - low > 1) {
        const uint32_t bound = low + (high - low) / 2;
        int32_t reach = 0;
        for (int64_t i = 0; i < count; i += LIST_STEP) {
            for (int j = 0; j < LIST_STEP; j++) reach += (int32_t)magnitudes[i + j] >= (int32_t)bound;
        }
        if (reach >= k) {
            low = bound, reach_low = reach;
        } else {
            high = bound, reach_high = reach;
        }
    }
    if (reach_low == k) high = low, reach_high = k;
    int64_t vacant = k - reach_high; /* for magnitudes of `low` */
    for (int64_t i = 0; i < count && kept < k; i++) {
        /* Without branches: which way they go is as good as random. */
        const uint32_t m = magnitudes[i];
        const int64_t equal = m == low && vacant > 0;
        s->places[kept] = s->places[i];
        vacant -= equal;
        kept += m >= high || equal;
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

/* Values and places of the k that are kept. */
INLINED void emit_kept(const pack_args *a, int64_t set, const scratch *s) {
    uint8_t *index = a->index + set * a->index_stride;
    const int64_t n = a->n, k = a->k;
    for (int64_t j = 0; j < k; j++) store_value(a, set * k + j, s->x[s->places[j]]);
    if (a->coding == POSITIONS) {
        for (int64_t j = 0; j < k; j++) store_number(index, j, position_size(n), s->places[j]);
    } else if (a->coding == MASK) {
        memset(index, 0, (size_t)width_of(n, 1));
        for (int64_t j = 0; j < k; j++) index[s->places[j] / 8] |= (uint8_t)(1u << s->places[j] % 8);
    } else {
        const int64_t blocks = (n - 1) / BLOCK, size = position_size(k + 1);
        uint8_t *offsets = index + blocks * size;
        int64_t block = 0;
        for (int64_t j = 0; j < k; j++) {
            for (; block < s->places[j] / BLOCK; block++) store_number(index, block, size, (uint32_t)j);
            offsets[j] = (uint8_t)(s->places[j] % BLOCK);
        }
        for (; block < blocks; block++) store_number(index, block, size, (uint32_t)k);
    }
}

INLINED double sum_of_squares(const float *restrict x, int64_t n) {
    double lanes[LANES] = {0};
    for (int64_t start = 0; start < n; start += PORTION) {
        for (int i = 0; i < LANES; i++) lanes[i] += SQUARES(double, x + start, i);
    }
    return sum_doubles(lanes);
}

/* Of a portion, sign and magnitude: the number of thresholds below |x|, and 2^(bits-1) for a negative x; and the level
 * of that number. */
INLINED void choose_levels(const float *restrict x, int64_t bits, const float *restrict t, const float *restrict levels,
                           uint8_t *restrict codes, float *restrict chosen) {
    const float v0 = levels[0], v1 = levels[bits > 1], v2 = levels[bits > 2 ? 2 : 0], v3 = levels[bits > 2 ? 3 : 0];
    const float v4 = levels[bits > 3 ? 4 : 0], v5 = levels[bits > 3 ? 5 : 0], v6 = levels[bits > 3 ? 6 : 0];
    const float v7 = levels[bits > 3 ? 7 : 0];
/* Not the sign bit: that of a NaN depends on the processor. */
#define SIGN(i) (x[i] < 0.0f ? 1u << (bits - 1) : 0u)
#define REACH(i, j) (float_of(magnitude(x[i])) > t[j])
#define OVER(i, j) (REACH(i, j) ? 1u : 0u)
    if (bits == 1) {
        for (int i = 0; i < PORTION; i++) codes[i] = (uint8_t)SIGN(i);
        for (int i = 0; i < PORTION; i++) chosen[i] = v0;
    } else if (bits == 2) {
        for (int i = 0; i < PORTION; i++) codes[i] = (uint8_t)(SIGN(i) + OVER(i, 0));
        for (int i = 0; i < PORTION; i++) chosen[i] = REACH(i, 0) ? v1 : v0;
    } else if (bits == 3) {
        for (int i = 0; i < PORTION; i++) codes[i] = (uint8_t)(SIGN(i) + OVER(i, 0) + OVER(i, 1) + OVER(i, 2));
        for (int i = 0; i < PORTION; i++) {
            const float a = REACH(i, 0) ? v1 : v0, b = REACH(i, 2) ? v3 : v2;
            chosen[i] = REACH(i, 1) ? b : a;
        }
    } else {
        for (int i = 0; i < PORTION; i++)
            codes[i] = (uint8_t)(SIGN(i) + OVER(i, 0) + OVER(i, 1) + OVER(i, 2) + OVER(i, 3) + OVER(i, 4) + OVER(i, 5) +
                                 OVER(i, 6));
        for (int i = 0; i < PORTION; i++) {
            const float a = REACH(i, 0) ? v1 : v0, b = REACH(i, 2) ? v3 : v2, c = REACH(i, 4) ? v5 : v4;
            const float d = REACH(i, 6) ? v7 : v6, e = REACH(i, 1) ? b : a, f = REACH(i, 5) ? d : c;
            chosen[i] = REACH(i, 3) ? f : e;
        }
    }
#undef OVER
#undef REACH
#undef SIGN
}

/* `bits` and `sums` are numbers that the compiler knows; without `sums`, nothing is computed but the codes. */
INLINED double encode_row_of(const float *x, int64_t n, int64_t bits, int sums, const float *thresholds,
                             const float *levels, uint8_t *fields) {
    double lanes[LANES] = {0};
    for (int64_t start = 0; start < n; start += PORTION) {
        uint8_t codes[PORTION];
        float chosen[PORTION];
        choose_levels(x + start, bits, thresholds, levels, codes, chosen);
#define PRODUCT(i) ((double)float_of(magnitude(x[start + (i)])) * (double)chosen[i])
        if (sums) {
            for (int i = 0; i < LANES; i++) lanes[i] += PRODUCT(i) + PRODUCT(LANES + i);
        }
#undef PRODUCT
        write_codes(codes, start, n, bits, fields);
    }
    return sum_doubles(lanes);
}

/* Codes of a row by its thresholds, 2^(bits-1) - 1 of them. `x` has zeros up to a full portion. Returns the sum of the
 * elements times their levels if `sums`, and else 0. */
INLINED double encode_row(const float *x, int64_t n, int64_t bits, int sums, const float *thresholds,
                          const float *levels, uint8_t *fields) {
    if (bits == 1) return encode_row_of(x, n, 1, sums, thresholds, levels, fields);
    if (bits == 2) return encode_row_of(x, n, 2, sums, thresholds, levels, fields);
    if (bits == 3) return encode_row_of(x, n, 3, sums, thresholds, levels, fields);
    return encode_row_of(x, n, 4, sums, thresholds, levels, fields);
}

INLINED void emit_codes(const pack_args *a, int64_t set, const scratch *s) {
    const int64_t n = a->n, count = ((int64_t)1 << (a->bits - 1)) - 1;
    float reach, thresholds[7];
    for (int64_t j = 0; j < a->k; j++) s->x[s->places[j]] = 0.0f;
    if (a->rotated) rotate_row(s->x, n, 0);
    const double squares = sum_of_squares(s->x, n);
    if (a->even) {
        reach = float_of(greatest_up_to(s->x, n, ABOVE_ALL - 1));
    } else {
        reach = (float)sqrt(squares / (double)(a->rotated ? n : n - a->k));
    }
    reach = from_bfloat16(to_bfloat16(reach));
    for (int64_t j = 0; j < count; j++) thresholds[j] = a->thresholds[j] * reach;
    uint8_t *fields = a->fields + set * a->fields_stride;
    if (a->rotated) {
        const double products = encode_row(s->x, n, a->bits, 1, thresholds, a->levels, fields);
        reach = products == 0.0 ? 0.0f : (float)(squares / products);
    } else {
        /* Such rows may be sparse: a scale that makes up for what the greatest are cut to would blow up the others. */
        encode_row(s->x, n, a->bits, 0, thresholds, a->levels, fields);
    }
    a->scale[set] = to_bfloat16(reach);
}

/* Where a set begins in `x`. */
INLINED int64_t offset_of(const pack_args *a, int64_t set) {
    const int64_t inner = set % a->sizes[2], middle = set / a->sizes[2] % a->sizes[1];
    const int64_t outer = set / a->sizes[2] / a->sizes[1];
    return outer * a->strides[0] + middle * a->strides[1] + inner * a->strides[2];
}

INLINED int64_t bytes_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* A set that is read soon, but no earlier than memory takes to bring it. */
INLINED const char *coming_set(const pack_args *a, int64_t set) {
    const int64_t sets = a->sizes[0] * a->sizes[1] * a->sizes[2], bytes = bytes_of(a->x_dtype);
    const int64_t coming = set + 1 + FETCH_AHEAD / (a->n * bytes);
    return (const char *)a->x + offset_of(a, smaller(coming, sets - 1)) * bytes;
}

INLINED void load_set(const pack_args *a, int64_t set, float *restrict to) {
    const char *coming = coming_set(a, set);
    const int64_t n = a->n, offset = offset_of(a, set), bytes = bytes_of(a->x_dtype);
    const float mean = a->mean ? a->mean[set] : 0.0f, rstd = a->rstd ? a->rstd[set] : 1.0f;
    const uint16_t *centre = a->centre ? a->centre + set / a->group * n : NULL;
    /* What torch would round, when it had computed it. */
    const int rounded = a->x_dtype == BFLOAT16 && (a->rstd || centre);
    for (int64_t start = 0; start < n; start += PORTION) {
        float x[PORTION];
        const int64_t count = smaller(PORTION, n - start);
        for (int64_t i = 0; i < PORTION * bytes; i += LINE) PREFETCH(coming + start * bytes + i);
        load_portion(a->x, a->x_dtype, offset + start, count, x);
        for (int i = 0; i < PORTION; i++) x[i] = (x[i] - mean) * rstd;
        if (centre) {
            for (int64_t i = 0; i < count; i++) x[i] -= from_bfloat16(centre[start + i]);
        }
        if (rounded) {
            for (int i = 0; i < PORTION; i++) x[i] = from_bfloat16(to_bfloat16(x[i]));
        }
        for (int64_t i = count; i < PORTION; i++) x[i] = 0.0f;
        for (int i = 0; i < PORTION; i++) to[start + i] = x[i];
    }
}

CLONED static void pack_sets(const pack_args *a, int64_t first, int64_t last, const scratch *s) {
    float ratio = 2.5f; /* what 1 % of normal numbers reach */
    for (int64_t set = first; set < last; set++) {
        load_set(a, set, s->x);
        if (a->k) {
            const uint32_t bound = find_bound(s->x, a->n, a->k, &ratio);
            const int64_t found = s->avx512 ? find_candidates_avx512(s->x, a->n, bound, s->places, s->magnitudes)
                                            : find_candidates(a->n, bound, s);
            keep_greatest(found, a->k, bound, s);
            emit_kept(a, set, s);
        }
        if (a->bits) emit_codes(a, set, s);
    }
}

EXPORTED int64_t hf_backrazor_pack(const pack_args *a) {
    int64_t sets = a->sizes[0] * a->sizes[1] * a->sizes[2], failed = 0;
    int64_t threads = smaller(a->threads, sets);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static) reduction(+ : failed)
#endif
    for (int64_t t = 0; t < threads; t++) {
        const size_t numel = (size_t)padded(a->n) + LIST_STEP;
        float *memory = malloc(numel * 3 * 4);
        if (!memory) {
            failed++;
            continue;
        }
        scratch s = {memory, (uint32_t *)(void *)(memory + numel), (uint32_t *)(void *)(memory + 2 * numel), HAS_AVX512};
        pack_sets(a, sets * t / threads, sets * (t + 1) / threads, &s);
        free(memory);
    }
    return failed ? NO_MEMORY : DONE;
}
