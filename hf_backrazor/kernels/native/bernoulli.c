/* The random bits of torch's CPU generator, a Mersenne twister, from its state as `torch.get_rng_state` gives it.
 *
 * M. Matsumoto and T. Nishimura, "Mersenne Twister", ACM Trans. Modeling and Computer Simulation 8, 1998. A number is
 * made as torch's `bernoulli_` does: 53 bits of two draws, as a fraction, compared with p.
 */
#include "native.h"

#define WORDS 624
#define AHEAD 397
#define MATRIX 0x9908b0dfu

enum { BYTES = 3 }; /* 0 or 1 in a byte; besides FLOAT32 and BFLOAT16 */

/* The beginning of torch's legacy state; every word in 64 bits. */
typedef struct {
    uint64_t seed;
    int32_t left;
    int32_t seeded;
    uint64_t next;
    uint64_t words[WORDS];
} generator_state;

INLINED uint32_t twisted(uint32_t a, uint32_t b) {
    uint32_t y = (a & 0x80000000u) | (b & 0x7fffffffu);
    return y >> 1 ^ ((0u - (b & 1u)) & MATRIX);
}

INLINED void next_words(uint32_t *restrict s) {
    for (int64_t i = 0; i < WORDS - AHEAD; i++) s[i] = s[i + AHEAD] ^ twisted(s[i], s[i + 1]);
    for (int64_t i = WORDS - AHEAD; i < WORDS - 1; i++) s[i] = s[i + AHEAD - WORDS] ^ twisted(s[i], s[i + 1]);
    s[WORDS - 1] = s[AHEAD - 1] ^ twisted(s[WORDS - 1], s[0]);
}

INLINED void temper(const uint32_t *restrict s, uint32_t *restrict to) {
    for (int64_t i = 0; i < WORDS; i++) {
        uint32_t y = s[i];
        y ^= y >> 11;
        y ^= y << 7 & 0x9d2c5680u;
        y ^= y << 15 & 0xefc60000u;
        to[i] = y ^ y >> 18;
    }
}

/* Elements from pairs of draws, high word first. */
INLINED void compare(const uint32_t *restrict draws, int64_t count, uint64_t bound, int64_t dtype, void *out, int64_t at) {
    uint8_t hit[WORDS];
    for (int64_t i = 0; i < count; i++) {
        uint64_t number = (uint64_t)(draws[2 * i] & 0x1fffffu) << 32 | draws[2 * i + 1];
        hit[i] = number < bound;
    }
    if (dtype == FLOAT32) {
        float *restrict to = (float *)out + at;
        for (int64_t i = 0; i < count; i++) to[i] = hit[i] ? 1.0f : 0.0f;
    } else if (dtype == BFLOAT16) {
        uint16_t *restrict to = (uint16_t *)out + at;
        for (int64_t i = 0; i < count; i++) to[i] = hit[i] ? 0x3f80 : 0;
    } else {
        memcpy((uint8_t *)out + at, hit, (size_t)count);
    }
}

CLONED static void draw(generator_state *g, uint64_t bound, int64_t dtype, void *out, int64_t n) {
    uint32_t words[WORDS], draws[WORDS + 1];
    int64_t held = 0, at = 0, next = (int64_t)g->next;
    for (int64_t i = 0; i < WORDS; i++) words[i] = (uint32_t)g->words[i];
    /* `left` is 1 when all words are used; the first draw of all makes new ones. */
    if (g->left == 1) next = WORDS;
    while (at < n) {
        if (next == WORDS) {
            next_words(words);
            next = 0;
        }
        uint32_t fresh[WORDS];
        temper(words, fresh);
        int64_t count = smaller(WORDS - next, 2 * (n - at) - held);
        memcpy(draws + held, fresh + next, (size_t)count * 4);
        next += count;
        held += count;
        compare(draws, held / 2, bound, dtype, out, at);
        at += held / 2;
        if (held % 2) draws[0] = draws[held - 1];
        held %= 2;
    }
    for (int64_t i = 0; i < WORDS; i++) g->words[i] = words[i];
    g->next = (uint64_t)next;
    g->left = (int32_t)(WORDS - next + 1);
}

/* n elements that are 1 with the probability bound / 2^53, else 0; the state goes on by 2 n draws. */
EXPORTED int64_t hf_backrazor_bernoulli(void *state, uint64_t bound, int64_t dtype, void *out, int64_t n) {
    generator_state g;
    memcpy(&g, state, sizeof g);
    draw(&g, bound, dtype, out, n);
    memcpy(state, &g, sizeof g);
    return DONE;
}
