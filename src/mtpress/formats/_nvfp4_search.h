/* The arithmetic of rounding/scale_search.py, compiled: which E4M3 scale leaves a block the least error.
 *
 * In: LANES blocks of BF16 numbers, and for a weighted error the form that they share. Out: an E4M3 code a block, the same as the
 * eager PyTorch definition for finite numbers. Leaves out: codes of the numbers, and the vector levels (_nvfp4.c includes this).
 *
 * Blocks stand side by side in a vector and every sum runs over a block from its first number to its last, so the bits do not
 * depend on how long a vector is.
 */
enum {
    LANES = 64,
    HIGHEST = 126, /* E4M3 code of 448 */
    ONE_CODE = 0x38,
    NORMAL = 8, /* code of the least number that is not subnormal: below its double neighbours are equally far apart */
};

/* Of lanes * WORDS words the even ones, then the odd ones; as often as WORDS is two times two, that turns a matrix. */
INLINE void unzip(const uint32_t *restrict words, uint32_t *restrict out)
{
    const int half = LANES * WORDS / 2;
    for (int i = 0; i < half; i++) {
        out[i] = words[2 * i];
        out[i + half] = words[2 * i + 1];
    }
}

INLINE float scale_value(int32_t code)
{
    float normal = as_float(((uint32_t)code << 20) + ((127u - 7u) << 23));
    return code < 8 ? (float)code * 0x1p-9f : normal;
}

/* What rounding a magnitude to E2M1 leaves: size less the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6; cuts: whether it can be 7 or more. */
INLINE float rest(float size, int cuts)
{
    int32_t bits = (int32_t)as_bits(size), six = (int32_t)as_bits(6.0f), one = (int32_t)as_bits(1.0f);
    int32_t cut = cuts && bits > six ? six : bits;
    int32_t power = (cut > one ? cut : one) & 0x7f800000;
    float shift = as_float((uint32_t)(power + (22 << 23))); /* its neighbours are as far apart as E2M1's numbers there */
    return size - ((as_float((uint32_t)cut) + shift) - shift);
}

typedef struct {
    float size[BLOCK][LANES]; /* magnitudes over scale_2 */
    int32_t sign[BLOCK][LANES];
    float least[LANES];
    int32_t chosen[LANES];
} tile;

INLINE void try_plain(tile *restrict t, const int32_t *restrict codes, int cuts)
{
    for (int l = 0; l < LANES; l++) {
        float value = scale_value(codes[l]), inverse = 1.0f / value, sum = 0.0f;
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK; i++) {
            float error = rest(t->size[i][l] * inverse, cuts);
            sum += error * error;
        }
        float loss = sum * (value * value);
        t->chosen[l] = loss < t->least[l] ? codes[l] : t->chosen[l];
        t->least[l] = loss < t->least[l] ? loss : t->least[l];
    }
}

/* form [BLOCK, BLOCK]: of a symmetric matrix, what is under the diagonal doubled, above it zeros. */
INLINE void try_weighted(tile *restrict t, const int32_t *restrict codes, const float *restrict form)
{
    float errors[BLOCK][LANES], inverse[LANES], sum[LANES];
    for (int l = 0; l < LANES; l++) {
        inverse[l] = 1.0f / scale_value(codes[l]);
        sum[l] = 0.0f;
    }
    for (int i = 0; i < BLOCK; i++)
        for (int l = 0; l < LANES; l++)
            errors[i][l] = as_float(as_bits(rest(t->size[i][l] * inverse[l], 1)) ^ (uint32_t)t->sign[i][l]);
    for (int i = 0; i < BLOCK; i += 4) { /* four rows at once: each is a chain of sums */
        const float *rows = form + i * BLOCK;
        for (int l = 0; l < LANES; l++) {
            float first = 0.0f, second = 0.0f, third = 0.0f, fourth = 0.0f;
            for (int j = 0; j < i + 4; j++) {
                float error = errors[j][l];
                first += rows[j] * error;
                second += rows[BLOCK + j] * error;
                third += rows[2 * BLOCK + j] * error;
                fourth += rows[3 * BLOCK + j] * error;
            }
            sum[l] += errors[i][l] * first;
            sum[l] += errors[i + 1][l] * second;
            sum[l] += errors[i + 2][l] * third;
            sum[l] += errors[i + 3][l] * fourth;
        }
    }
    for (int l = 0; l < LANES; l++) {
        float value = scale_value(codes[l]), loss = sum[l] * (value * value);
        t->chosen[l] = loss < t->least[l] ? codes[l] : t->chosen[l];
        t->least[l] = loss < t->least[l] ? loss : t->least[l];
    }
}

/* words: of LANES blocks, one after another; below, above: how far from the largest magnitude's code the search goes; where both are
 * zero, between the codes that take the largest magnitude to 6 and to 4. */
INLINE void search_tile(const uint32_t *restrict words, const float *restrict form, float scale_2, int below, int above, uint8_t *restrict scales)
{
    uint32_t turned[LANES * WORDS], other[LANES * WORDS];
    int32_t amax[LANES], first[LANES], codes[LANES], ends[LANES];
    float unused, up = scale_2 < 0x1p-100f ? 0x1p64f : 1.0f, inverse = 1.0f / (scale_2 * up); /* finite and no subnormal number */
    tile t;
    unzip(words, turned);
    unzip(turned, other);
    unzip(other, turned);
    for (int l = 0; l < LANES; l++)
        amax[l] = 0;
    for (int i = 0; i < WORDS; i++) {
        for (int l = 0; l < LANES; l++) {
            uint32_t word = turned[i * LANES + l];
            int32_t size = larger_magnitude(word);
            amax[l] = size > amax[l] ? size : amax[l];
            t.size[2 * i][l] = as_float((word & 0x7fffu) << 16) * up * inverse;
            t.size[2 * i + 1][l] = as_float(word & 0x7fff0000u) * up * inverse;
            t.sign[2 * i][l] = (int32_t)(word << 16 & 0x80000000u);
            t.sign[2 * i + 1][l] = (int32_t)(word & 0x80000000u);
        }
    }
    for (int l = 0; l < LANES; l++) {
        first[l] = (int32_t)encode_scale(clamped(as_float((uint32_t)amax[l] << 16) / (6.0f * scale_2)), &unused);
        t.least[l] = INFINITY;
        t.chosen[l] = first[l];
    }
    if (below == 0 && above == 0) {
        for (int l = 0; l < LANES; l++)
            codes[l] = (int32_t)encode_scale(clamped(as_float((uint32_t)amax[l] << 16) / (4.0f * scale_2)), &unused);
        try_plain(&t, first, 1);
        try_plain(&t, codes, 0);
    } else {
        int32_t last = -below;
        for (int l = 0; l < LANES; l++) {
            int32_t end = first[l] < NORMAL ? 2 * NORMAL - 1 : first[l] + above;
            ends[l] = end < HIGHEST ? end : HIGHEST;
            int32_t offset = amax[l] == 0 ? -below : ends[l] - first[l];
            last = offset > last ? offset : last;
        }
        for (int offset = -below; offset <= last; offset++) {
            for (int l = 0; l < LANES; l++) {
                int32_t code = first[l] + offset;
                code = code < 1 ? 1 : code;
                codes[l] = code > ends[l] ? ends[l] : code;
            }
            if (form)
                try_weighted(&t, codes, form);
            else if (offset <= 0) /* subnormal scales are rounded as coarsely as to half of what they should be */
                try_plain(&t, codes, 1);
            else
                try_plain(&t, codes, 0);
        }
    }
    for (int l = 0; l < LANES; l++)
        scales[l] = (uint8_t)(amax[l] == 0 ? ONE_CODE : t.chosen[l]);
}

enum { FORM = BLOCK * BLOCK };

/* Rows of `blocks` blocks each; forms: one for each block of a row, or NULL. */
INLINE void search_rows(const uint8_t *weight, const float *forms, uint8_t *scales, size_t rows, size_t blocks, float scale_2, int below, int above)
{
    uint32_t words[LANES * WORDS];
    uint8_t found[LANES];
    if (forms == NULL) { /* all blocks are alike */
        blocks *= rows;
        for (size_t b = 0; b < blocks; b += LANES) {
            size_t count = blocks - b < LANES ? blocks - b : LANES;
            memset(words, 0, sizeof words);
            memcpy(words, weight + b * BLOCK_BYTES, count * BLOCK_BYTES);
            search_tile(words, NULL, scale_2, below, above, found);
            memcpy(scales + b, found, count);
        }
        return;
    }
    for (size_t row = 0; row < rows; row += LANES) {
        size_t count = rows - row < LANES ? rows - row : LANES;
        memset(words, 0, sizeof words);
        for (size_t b = 0; b < blocks; b++) {
            for (size_t l = 0; l < count; l++)
                memcpy(words + l * WORDS, weight + ((row + l) * blocks + b) * BLOCK_BYTES, BLOCK_BYTES);
            search_tile(words, forms + b * FORM, scale_2, below, above, found);
            for (size_t l = 0; l < count; l++)
                scales[(row + l) * blocks + b] = found[l];
        }
    }
}
