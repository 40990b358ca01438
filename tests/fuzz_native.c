/* Runs every function of the C library on random shapes, in buffers of exactly the size it is told: for the address and
 * the undefined-behaviour sanitizer to watch. What can be seen from outside is checked as well.
 *
 *     cc -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -DHF_BACKRAZOR_ONE_TARGET -fopenmp \
 *         -I hf_backrazor/kernels/native tests/fuzz_native.c hf_backrazor/kernels/native/[!m]*.c -lm && ./a.out 2000 1
 */
#include <math.h>
#include <stdio.h>

#include "index.h"
#include "native.h"

EXPORTED int64_t hf_backrazor_pack(const pack_args *);
EXPORTED int64_t hf_backrazor_unpack(const unpack_args *);
EXPORTED int64_t hf_backrazor_encode_cells(const cells_args *);
EXPORTED int64_t hf_backrazor_decode_cells(const values_args *);
EXPORTED int64_t hf_backrazor_integers(const integers_args *);
EXPORTED int64_t hf_backrazor_round(const round_args *);
EXPORTED int64_t hf_backrazor_gradient(const gradient_args *);
EXPORTED int64_t hf_backrazor_norm(const norm_args *);
EXPORTED int64_t hf_backrazor_batch_norm(const batch_norm_args *);
EXPORTED int64_t hf_backrazor_pack_steps(const steps_args *);
EXPORTED int64_t hf_backrazor_times_steps(const steps_args *);
EXPORTED int64_t hf_backrazor_bernoulli(void *, uint64_t, int64_t, void *, int64_t);

#define REQUIRE(condition)                                                                    \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition);                   \
            exit(1);                                                                          \
        }                                                                                     \
    } while (0)

static uint64_t state;

static uint32_t draw(void) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33);
}

static int64_t between(int64_t low, int64_t high) { return low + draw() % (high - low + 1); }

/* Freed together at the end of a case. */
static void *owned[64];
static int owned_count;

static void *buffer(int64_t bytes) {
    uint8_t *p = malloc((size_t)(bytes ? bytes : 1));
    REQUIRE(p && owned_count < 64);
    for (int64_t i = 0; i < bytes; i++) p[i] = (uint8_t)draw();
    return owned[owned_count++] = p;
}

static void release(void) {
    while (owned_count) free(owned[--owned_count]);
}

/* Ordinary numbers; or with ties; or any bits at all, infinities and NaN among them. */
static float *floats(int64_t count, int kind) {
    float *x = buffer(count * 4);
    if (kind == 2) return x;
    for (int64_t i = 0; i < count; i++) {
        x[i] = ((float)draw() + (float)draw() + (float)draw()) / 2147483648.0f - 1.5f;
        if (kind == 1) x[i] = roundf(x[i] * 4.0f);
    }
    return x;
}

static uint16_t *halves(int64_t count) {
    uint16_t *x = buffer(count * 2);
    float *from = floats(count, 0);
    for (int64_t i = 0; i < count; i++) x[i] = to_bfloat16(from[i]);
    return x;
}

static int64_t index_bytes(int64_t n, int64_t k, int64_t coding) {
    if (coding == MASK) return width_of(n, 1);
    if (coding == POSITIONS) return k * position_size(n);
    return coding == OFFSETS ? k + (n - 1) / BLOCK * position_size(k + 1) : 0;
}

static int64_t code_bytes(int64_t n, int64_t bits) {
    return bits == 3 ? width_of(n, 2) + width_of(n, 1) : width_of(n, bits);
}

static int64_t any_width(void) {
    static const int64_t odd[] = {1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 768};
    return between(0, 1) ? odd[draw() % 18] : between(1, 900);
}

/* Pack, unpack, and what reads the same parts: integers, the weight's gradient, a norm's gradients. */
static void rows_case(void) {
    const int kind = (int)between(0, 2);
    int64_t n = any_width(), k = between(0, 1) ? between(0, n - 1) : smaller(n - 1, n / 100 + 1), outer = between(1, 3);
    int64_t inner = between(1, 9), rows = outer * inner, half = between(0, 3) == 0, gap = between(0, 5);
    int64_t coding = k ? between(MASK, OFFSETS) : NO_INDEX, bits = k ? between(0, 4) : between(1, 4);
    int64_t value_dtype = between(FLOAT32, BFLOAT16), even = between(0, 1), centred = between(0, 1), stride = n + gap;
    /* The last row ends where the buffer does. */
    int64_t count = (rows - 1) * stride + n;
    const float *dense = floats(count, kind);
    uint16_t *as_half = half ? halves(count) : NULL;
    float thresholds[7] = {0.2f, 0.5f, 0.8f, 1.0f, 1.3f, 1.7f, 2.2f}, levels[16];
    float positive[8] = {0.1f, 0.3f, 0.6f, 0.9f, 1.2f, 1.5f, 2.0f, 2.5f};
    pack_args p = {.x = half ? (const void *)as_half : dense, .x_dtype = half ? BFLOAT16 : FLOAT32, .n = n, .k = k};
    p.sizes[0] = 1, p.sizes[1] = outer, p.sizes[2] = inner;
    p.strides[1] = inner * stride, p.strides[2] = stride;
    p.mean = between(0, 1) ? floats(rows, 0) : NULL, p.rstd = p.mean ? floats(rows, 0) : NULL;
    p.group = inner, p.centre = centred ? halves(outer * n) : NULL;
    p.coding = coding, p.value_dtype = value_dtype, p.values = buffer(rows * k * (value_dtype == FLOAT32 ? 4 : 2));
    p.index_stride = index_bytes(n, k, coding), p.index = buffer(rows * p.index_stride);
    p.bits = bits, p.even = even, p.thresholds = thresholds, p.levels = positive, p.scale = buffer(rows * 2);
    p.rotated = between(0, 1);
    p.fields_stride = bits ? code_bytes(n, bits) : 0, p.fields = buffer(rows * p.fields_stride);
    p.threads = between(1, 4);
    REQUIRE(hf_backrazor_pack(&p) == DONE);

    for (int i = 0; i < 16; i++) levels[i] = (float)i / 8.0f - 1.0f;
    int64_t base = bits == 0 && between(0, 1), out_half = between(0, 3) == 0;
    unpack_args u = {.rows = rows, .n = n, .bits = bits, .levels = levels, .fields = p.fields, .k = k};
    u.scale = between(0, 3) ? p.scale : NULL, u.fields_stride = p.fields_stride;
    u.coding = coding, u.value_dtype = value_dtype, u.values = p.values, u.index = p.index;
    u.index_stride = p.index_stride, u.centre = p.centre, u.group = inner, u.keep_base = base;
    u.rotated = p.rotated;
    u.out_dtype = out_half ? BFLOAT16 : FLOAT32, u.out = buffer(rows * n * (out_half ? 2 : 4));
    u.gain = between(0, 1) ? floats(rows, 0) : NULL, u.offset = between(0, 1) ? floats(rows, 0) : NULL;
    u.low = between(0, 1) ? 0.0f : -INFINITY, u.high = between(0, 1) ? 6.0f : INFINITY;
    u.threads = between(1, 4);
    REQUIRE(hf_backrazor_unpack(&u) == DONE);

    /* What is added is what is unpacked. */
    unpack_args sum = u;
    sum.keep_base = 0, sum.out_dtype = FLOAT32, sum.out = buffer(rows * n * 4);
    REQUIRE(hf_backrazor_unpack(&sum) == DONE);
    const float *terms = sum.out, *before = floats(rows * n, 0);
    sum.accumulate = between(0, 1) ? 1 : -1, sum.out = memcpy(buffer(rows * n * 4), before, (size_t)(rows * n) * 4);
    REQUIRE(hf_backrazor_unpack(&sum) == DONE);
    for (int64_t i = 0; i < rows * n; i++) {
        const float found = ((const float *)sum.out)[i], term = sum.accumulate > 0 ? terms[i] : -terms[i];
        REQUIRE(terms[i] != terms[i] ? found != found : found == before[i] + term);
    }

    /* Exactly k are kept, in ascending order, and no other element is greater than the least of them. */
    for (int64_t row = 0; row < rows && k; row++) {
        int64_t last = -1, seen = 0;
        float least = INFINITY;
        const uint8_t *index = p.index + row * p.index_stride;
        uint8_t *kept = calloc((size_t)n, 1);
        REQUIRE(kept);
        FOR_EACH_KEPT(index, n, k, coding, i, j, REQUIRE(i > last); last = i; seen++; kept[i] = 1);
        REQUIRE(seen == k);
        if (kind < 2 && !half && !p.mean && !p.centre) {
            const float *x = dense + row * stride;
            for (int64_t i = 0; i < n; i++) least = kept[i] && fabsf(x[i]) < least ? fabsf(x[i]) : least;
            for (int64_t i = 0; i < n; i++) REQUIRE(kept[i] || fabsf(x[i]) <= least);
        }
        free(kept);
    }

    if (bits) {
        const int64_t members = between(1, 5);
        uint8_t *member = between(0, 1) ? buffer(rows) : NULL;
        for (int64_t row = 0; member && row < rows; row++) member[row] = (uint8_t)between(0, members - 1);
        integers_args g = {.rows = rows, .n = n, .bits = bits, .table = buffer(members << bits), .fields = p.fields};
        g.member = member;
        g.fields_stride = p.fields_stride, g.k = k, g.coding = coding, g.index = p.index;
        g.index_stride = p.index_stride, g.out = buffer(rows * n), g.threads = between(1, 4);
        REQUIRE(hf_backrazor_integers(&g) == DONE);
    }

    int64_t columns = any_width(), transposed = between(0, 1);
    const float *grad = floats(rows * columns, kind);
    round_args r = {.grad = grad, .rows = rows, .columns = columns, .row_scale = between(0, 1) ? p.scale : NULL};
    r.seed = draw(), r.out = buffer(rows * columns), r.scale = buffer(columns * 4), r.sum = buffer(columns * 4);
    r.threads = between(1, 4);
    REQUIRE(hf_backrazor_round(&r) == DONE);
    gradient_args w = {.product = buffer(columns * n * 4), .scale = r.scale, .grad = grad, .rows = rows, .n = n};
    w.columns = columns, w.k = k, w.coding = coding, w.value_dtype = value_dtype, w.values = p.values;
    w.index = p.index, w.index_stride = p.index_stride, w.gamma = between(0, 1) ? floats(n, 0) : NULL;
    w.beta = between(0, 1) ? floats(n, 0) : NULL, w.grad_sum = r.sum, w.transposed = transposed;
    w.threads = between(1, 4);
    REQUIRE(hf_backrazor_gradient(&w) == DONE);

    norm_args m = {.x_hat = u, .grad = floats(rows * n, kind), .rstd = floats(rows, 0), .centred = between(0, 1)};
    m.x_hat.keep_base = 0, m.x_hat.centre = NULL, m.block = between(1, 5), m.gamma = between(0, 1) ? floats(n, 0) : NULL;
    int64_t blocks = (rows + m.block - 1) / m.block;
    m.grad_input = buffer(rows * n * 4), m.grad_gamma = buffer(blocks * n * 4), m.grad_beta = buffer(blocks * n * 4);
    m.threads = between(1, 4);
    REQUIRE(hf_backrazor_norm(&m) == DONE);

    batch_norm_args b = {.x_hat = m.x_hat, .grad = m.grad, .scale = floats(inner, 0), .batch = outer, .channels = inner};
    b.by_batch = between(0, 1), b.grad_input = m.grad_input;
    b.grad_gamma = buffer(inner * 4), b.grad_beta = buffer(inner * 4), b.threads = between(1, 4);
    REQUIRE(hf_backrazor_batch_norm(&b) == DONE);
    release();
}

static void cells_case(void) {
    int64_t n = any_width(), rows = between(1, 20), gap = between(0, 5), half = between(0, 3) == 0, bits = between(1, 4);
    int64_t count = (rows - 1) * (n + gap) + n;
    int64_t cells = (int64_t)1 << bits, members = between(0, 3) ? between(1, 60) : 256;
    uint8_t *starts = buffer(members * cells);
    float *bounds = buffer((members - 1) * 4), *density = buffer(members * 4), *table = buffer(members * cells * 4);
    for (int64_t i = 0; i < members * cells; i++) {
        starts[i] = i % cells ? (uint8_t)(starts[i - 1] + between(1, 16)) : 0;
        table[i] = (float)(i % cells);
    }
    for (int64_t i = 0; i < members - 1; i++) bounds[i] = ldexpf(1.0f, (int)(i - members / 2) / 2);
    for (int64_t i = 0; i < members; i++) density[i] = 32.0f * ldexpf(1.0f, (int)(members / 2 - i) / 4);
    cells_args c = {.rows = rows, .n = n, .stride = n + gap, .bits = bits, .members = members, .bounds = bounds};
    c.x = half ? (void *)halves(count) : floats(count, (int)between(0, 2)), c.x_dtype = half ? BFLOAT16 : FLOAT32;
    c.density = density, c.starts = starts, c.fields_stride = code_bytes(n, bits);
    c.fields = buffer(rows * c.fields_stride), c.member = buffer(rows), c.threads = between(1, 4);
    REQUIRE(hf_backrazor_encode_cells(&c) == DONE);

    /* What was coded lies between the bounds of its cell. */
    values_args v = {.rows = rows, .n = n, .bits = bits, .table = table, .member = c.member, .fields = c.fields};
    v.fields_stride = c.fields_stride, v.out = buffer(rows * n * 4), v.out_dtype = FLOAT32, v.threads = between(1, 4);
    REQUIRE(hf_backrazor_decode_cells(&v) == DONE);
    for (int64_t row = 0; row < rows; row++) {
        REQUIRE(c.member[row] < members);
        for (int64_t i = 0; i < n && !half; i++) {
            const float x = ((const float *)c.x)[row * c.stride + i], step = x * density[c.member[row]] + 128.0f;
            const int64_t cell = (int64_t)((const float *)v.out)[row * n + i];
            const uint8_t *s = starts + c.member[row] * cells;
            REQUIRE(cell == 0 || !(step < s[cell]));
            REQUIRE(cell == cells - 1 || !(step >= s[cell + 1]));
        }
    }
    v.out = buffer(rows * n * 2), v.out_dtype = BFLOAT16;
    REQUIRE(hf_backrazor_decode_cells(&v) == DONE);
    release();
}

static void steps_case(void) {
    int64_t n = any_width() * between(1, 5), half = between(0, 1), bytes = n * (half ? 2 : 4);
    steps_args s = {.dtype = half ? BFLOAT16 : FLOAT32, .numel = n, .low = 0.0f, .high = between(0, 1) ? 1.0f : NAN};
    s.x = half ? (void *)halves(n) : floats(n, (int)between(0, 2)), s.bits = buffer(width_of(n, 1));
    s.threads = between(1, 4);
    REQUIRE(hf_backrazor_pack_steps(&s) == DONE);
    s.inside = (float)between(0, 1), s.outside = between(0, 1) ? 0.5f : 0.0f, s.out = buffer(bytes);
    REQUIRE(hf_backrazor_times_steps(&s) == DONE);
    for (int64_t i = 0; i < n && !half && s.inside == 1.0f && s.outside == 0.0f; i++) {
        const float x = ((const float *)s.x)[i], y = ((const float *)s.out)[i];
        REQUIRE(x != x || (x > 0.0f && !(x >= s.high) ? y == x : y == 0.0f));
    }
    release();
}

/* The numbers of a run, drawn in two parts, are those drawn at once. */
static void bernoulli_case(void) {
    enum { WORDS = 624, BYTES = 3 };
    int64_t n = between(0, 2000), first = between(0, n), used = between(0, WORDS);
    uint64_t state_size = 24 + 8 * WORDS, next = (uint64_t)used;
    int32_t left = (int32_t)(WORDS - used + 1);
    uint8_t *a = buffer((int64_t)state_size), *at_once = buffer(n), *one = buffer(first), *two = buffer(n - first);
    for (int64_t i = 0; i < WORDS; i++) memset(a + 24 + 8 * i + 4, 0, 4);
    memcpy(a + 8, &left, 4);
    memcpy(a + 16, &next, 8);
    uint8_t *b = buffer((int64_t)state_size);
    memcpy(b, a, state_size);
    uint64_t bound = (uint64_t)draw() << 22;
    REQUIRE(hf_backrazor_bernoulli(a, bound, BYTES, at_once, n) == DONE);
    REQUIRE(hf_backrazor_bernoulli(b, bound, BYTES, one, first) == DONE);
    REQUIRE(hf_backrazor_bernoulli(b, bound, BYTES, two, n - first) == DONE);
    REQUIRE(!memcmp(at_once, one, (size_t)first) && !memcmp(at_once + first, two, (size_t)(n - first)));
    REQUIRE(hf_backrazor_bernoulli(a, bound, FLOAT32, buffer(n * 4), n) == DONE);
    REQUIRE(hf_backrazor_bernoulli(a, bound, BFLOAT16, buffer(n * 2), n) == DONE);
    release();
}

int main(int argc, char **argv) {
    int64_t cases = argc > 1 ? atoll(argv[1]) : 1000;
    state = argc > 2 ? (uint64_t)atoll(argv[2]) : 1;
    for (int64_t i = 0; i < cases; i++) {
        rows_case();
        cells_case();
        steps_case();
        bernoulli_case();
    }
    printf("%lld cases\n", (long long)cases);
    return 0;
}
