/* The arithmetic of rounding/search.py and rounding/rtn.py, and the packing of formats/int4.py, compiled.
 *
 * In: a buffer of BF16 numbers in groups of 128, or of codes, and which level of vector instructions to use. Out: the same codes,
 * FP16 scales and words as the eager PyTorch definitions; tests/formats/test_int4_kernel.py holds them together. Leaves out: tensors
 * and threads (int4_kernel.py); the interpreter lock is released, so pieces of one matrix can be worked on at once.
 *
 * Candidate scales stand side by side in a vector and every sum runs over the group from its first number to its last, so the
 * bits do not depend on how long a vector is. Every float32 operation rounds as in PyTorch: no fast-math, no fused multiply-add.
 */
#define Py_LIMITED_API 0x030B0000 /* one binary for every CPython from 3.11 on */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "fast-math changes the bits"
#endif
#if FLT_EVAL_METHOD != 0
#error "float32 operations must round to float32"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "BF16 and FP16 numbers are stored little-endian"
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math") /* nobody reads the exception flags, and with them GCC leaves choices between numbers scalar */
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

enum {
    GROUP = 128,   /* numbers that share a scale */
    COARSE = 32,   /* candidates of the first round */
    FINE = 16,     /* of the second, the two of plain rounding among them */
    AT_ONCE = 8,   /* numbers that are added to the sums of a candidate before they go back to memory */
    ROWS = 16,     /* packed side by side: a cache line of words */
    INFINITE = 0x7f80,
    HALF_NAN = 0x7e00,
};
static const float LEAST_SCALE = 168.0f / 16777216.0f, LEAST_AMAX = 0x1p-100f;

INLINE float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* FP16 bits of a number that is no NaN, to nearest, ties to even. */
INLINE uint32_t to_half(float value)
{
    uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    uint32_t normal = (size + 0xfffu + (size >> 13 & 1u)) >> 13;
    normal = normal > 0x23c00u ? 0x7c00u : normal - ((127 - 15) << 10);
    uint32_t subnormal = as_bits(as_float(size) + 0.5f) - as_bits(0.5f); /* from 0.5 on float32 goes in steps of 2^-24 too */
    return sign | (size < 0x38800000u ? subnormal : normal);
}

INLINE float from_half(uint32_t half)
{
    uint32_t size = half & 0x7fffu;
    float value = as_float((size << 13) + ((127 - 15) << 23));
    value = size < 0x400u ? (float)(int32_t)size * 0x1p-24f : value;
    value = size >= 0x7c00u ? INFINITY : value;
    return half & 0x8000u ? -value : value;
}

/* The integer from -8 to 7 that is nearest to a number, ties to even. */
INLINE float nearest(float scaled)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: from there on float32 goes in steps of 1, so the sum is rounded for us */
    int32_t bits = (int32_t)as_bits(scaled + shift), lowest = (int32_t)as_bits(shift - 8.0f), highest = (int32_t)as_bits(shift + 7.0f);
    bits = bits > lowest ? bits : lowest; /* numbers order as their bits do, and integers have vector instructions for it */
    bits = bits < highest ? bits : highest;
    return as_float((uint32_t)bits) - shift;
}

/* For each candidate, by its reciprocal: products[c] = sum of w q, squares[c] = sum of q q; by importance, sums of (h w) q and h (q q). */
INLINE void sums(const float *restrict w, const float *restrict hw, const float *restrict h, const float *restrict inverse,
                 float *restrict products, float *restrict squares, int count)
{
    memset(products, 0, sizeof *products * (size_t)count);
    memset(squares, 0, sizeof *squares * (size_t)count);
    for (int i = 0; i < GROUP; i += AT_ONCE) {
        for (int c = 0; c < count; c++) {
            float product = products[c], square = squares[c];
#pragma GCC unroll 8
            for (int j = 0; j < AT_ONCE; j++) {
                float q = nearest(w[i + j] * inverse[c]);
                product += (h ? hw : w)[i + j] * q;
                square += h ? h[i + j] * (q * q) : q * q;
            }
            products[c] = product;
            squares[c] = square;
        }
    }
}

/* The numbers of a group, and the bits of the largest magnitude; one that is not finite gets a NaN for a scale. */
INLINE int32_t load_group(const uint8_t *weight, float *restrict w, uint8_t *codes, uint8_t *scale)
{
    uint16_t bits[GROUP];
    int32_t largest = 0;
    memcpy(bits, weight, sizeof bits);
    for (int i = 0; i < GROUP; i++) {
        int32_t size = bits[i] & 0x7fff;
        largest = size > largest ? size : largest;
        w[i] = as_float((uint32_t)bits[i] << 16);
    }
    if (largest >= INFINITE) {
        const uint16_t nan = HALF_NAN;
        memset(codes, 8, GROUP);
        memcpy(scale, &nan, sizeof nan);
    }
    return largest;
}

INLINE void round_group(const uint8_t *weight, uint8_t *codes, uint8_t *scale)
{
    float w[GROUP], low = 0.0f, high = 0.0f;
    if (load_group(weight, w, codes, scale) >= INFINITE)
        return;
    for (int i = 0; i < GROUP; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    float exact = (high < -low ? -low : -high) * 0.125f;
    float step = from_half(to_half(exact)), least = step < 0.0f ? -LEAST_SCALE : LEAST_SCALE;
    step = fabsf(step) < LEAST_SCALE ? least : step;
    const uint16_t half = (uint16_t)to_half(step);
    memcpy(scale, &half, sizeof half);
    for (int i = 0; i < GROUP; i++)
        codes[i] = (uint8_t)((int32_t)nearest(w[i] / step) + 8);
}

/* h: how much errors of the group's columns count, or NULL. */
INLINE void search_group(const uint8_t *weight, uint8_t *codes, uint8_t *scale, const float *factors, const float *h)
{
    float w[GROUP], hw[GROUP], inverse[COARSE], products[COARSE], squares[COARSE], candidates[FINE];
    int32_t largest = load_group(weight, w, codes, scale);
    if (largest >= INFINITE)
        return;
    if (h)
        for (int i = 0; i < GROUP; i++)
            hw[i] = h[i] * w[i];
    float amax = as_float((uint32_t)largest << 16);
    float unit = 1.0f / (amax < LEAST_AMAX ? LEAST_AMAX : amax);
    for (int c = 0; c < COARSE; c++)
        inverse[c] = factors[c] * unit;
    sums(w, hw, h, inverse, products, squares, COARSE);
    float best = 0.0f, middle = LEAST_SCALE;
    for (int c = 0; c < COARSE; c++) {
        float gain = products[c] * products[c] / squares[c]; /* a NaN where all codes are those of zero */
        middle = gain > best ? products[c] / squares[c] : middle;
        best = gain > best ? gain : best;
    }
    for (int c = 0; c < FINE; c++) {
        float factor = factors[COARSE + c];
        float candidate = from_half(to_half(c < FINE - 2 ? middle * factor : amax * factor));
        float least = candidate < 0.0f ? -LEAST_SCALE : LEAST_SCALE;
        candidates[c] = fabsf(candidate) < LEAST_SCALE ? least : candidate;
        inverse[c] = 1.0f / candidates[c];
    }
    sums(w, hw, h, inverse, products, squares, FINE);
    int chosen = 0;
    float least = INFINITY;
    for (int c = 0; c < FINE; c++) {
        float loss = candidates[c] * (candidates[c] * squares[c] - 2.0f * products[c]); /* less the sum of w w */
        chosen = loss < least ? c : chosen;
        least = loss < least ? loss : least;
    }
    const uint16_t half = (uint16_t)to_half(candidates[chosen]);
    memcpy(scale, &half, sizeof half);
    for (int i = 0; i < GROUP; i++)
        codes[i] = (uint8_t)((int32_t)nearest(w[i] * inverse[chosen]) + 8);
}

/* Words of some rows of codes [rows, k], at most ROWS of them; the word of row r and columns 8i… goes to words[i * stride + r]. */
INLINE void pack_rows(const uint8_t *codes, uint8_t *words, size_t rows, size_t k, size_t stride)
{
    for (size_t i = 0; i < k / 8; i++) {
        uint32_t column[ROWS];
        for (size_t r = 0; r < rows; r++) {
            uint64_t eight; /* a code a byte; then two, four, eight in a row */
            memcpy(&eight, codes + r * k + 8 * i, sizeof eight);
            eight = (eight | eight >> 4) & 0x00ff00ff00ff00ffu;
            eight = (eight | eight >> 8) & 0x0000ffff0000ffffu;
            column[r] = (uint32_t)(eight | eight >> 16);
        }
        memcpy(words + sizeof(uint32_t) * i * stride, column, sizeof(uint32_t) * rows);
    }
}

INLINE void pack(const uint8_t *codes, uint8_t *words, size_t rows, size_t k, size_t stride)
{
    size_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        pack_rows(codes + r * k, words + sizeof(uint32_t) * r, ROWS, k, stride);
    if (r < rows)
        pack_rows(codes + r * k, words + sizeof(uint32_t) * r, rows - r, k, stride);
}

/* factors: of search.py, or NULL for plain rounding. importance: of the columns of `across` groups, or NULL; first: the number of the
 * first group. */
typedef struct {
    const float *factors, *importance;
    size_t first, across;
} how;
typedef void round_function(const uint8_t *weight, uint8_t *codes, uint8_t *scales, size_t groups, how by);
typedef void pack_function(const uint8_t *codes, uint8_t *words, size_t rows, size_t k, size_t stride);

#define LEVEL(name, target)                                                                                                 \
    target static void round_##name(const uint8_t *weight, uint8_t *codes, uint8_t *scales, size_t groups, how by)         \
    {                                                                                                                       \
        for (size_t g = 0; g < groups; g++) {                                                                               \
            const uint8_t *from = weight + g * 2 * GROUP;                                                                   \
            uint8_t *into = codes + g * GROUP, *scale = scales + g * 2;                                                     \
            if (by.importance != NULL)                                                                                      \
                search_group(from, into, scale, by.factors, by.importance + (by.first + g) % by.across * GROUP);            \
            else if (by.factors != NULL)                                                                                    \
                search_group(from, into, scale, by.factors, NULL);                                                          \
            else                                                                                                            \
                round_group(from, into, scale);                                                                             \
        }                                                                                                                   \
    }                                                                                                                       \
    target static void pack_##name(const uint8_t *codes, uint8_t *words, size_t rows, size_t k, size_t stride)             \
    {                                                                                                                       \
        pack(codes, words, rows, k, stride);                                                                                \
    }

LEVEL(generic, )
#if defined(__GNUC__) && defined(__x86_64__)
#define X86
LEVEL(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
LEVEL(avx2, __attribute__((target("avx2"))))
#endif

static const struct {
    const char *name;
    round_function *round;
    pack_function *pack;
} levels[] = {
#ifdef X86
    {"avx512", round_avx512, pack_avx512},
    {"avx2", round_avx2, pack_avx2},
#endif
    {"generic", round_generic, pack_generic},
};
#include "_levels.h"

static PyObject *py_round(PyObject *module, PyObject *args)
{
    const char *name;
    Py_ssize_t first;
    Py_buffer weight, codes, scales, factors, importance;
    (void)module;
    if (!PyArg_ParseTuple(args, "sy*w*w*y*y*n", &name, &weight, &codes, &scales, &factors, &importance, &first))
        return NULL;
    PyObject *result = NULL;
    int level = find_level(name);
    if (level < 0)
        goto done;
    if (weight.len != codes.len * 2 || codes.len != scales.len / 2 * GROUP ||
        (factors.len && factors.len != (COARSE + FINE) * (Py_ssize_t)sizeof(float))) {
        PyErr_SetString(PyExc_ValueError, "a group is 256 bytes of weight, 128 of codes and 2 of scales; of factors there are 48 or none");
        goto done;
    }
    if (first < 0 || importance.len % (GROUP * (Py_ssize_t)sizeof(float)) || (importance.len && !factors.len)) {
        PyErr_SetString(PyExc_ValueError, "importance has 128 numbers for each group of a row, or none, and goes with factors");
        goto done;
    }
    const how by = {
        factors.len ? factors.buf : NULL, importance.len ? importance.buf : NULL, (size_t)first,
        (size_t)importance.len / (GROUP * sizeof(float)),
    };
    Py_BEGIN_ALLOW_THREADS
    levels[level].round(weight.buf, codes.buf, scales.buf, (size_t)scales.len / 2, by);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&weight);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&scales);
    PyBuffer_Release(&factors);
    PyBuffer_Release(&importance);
    return result;
}

static PyObject *py_pack(PyObject *module, PyObject *args)
{
    const char *name;
    Py_ssize_t k, first, last;
    Py_buffer codes, words;
    (void)module;
    if (!PyArg_ParseTuple(args, "sy*w*nnn", &name, &codes, &words, &k, &first, &last))
        return NULL;
    PyObject *result = NULL;
    int level = find_level(name);
    if (level < 0)
        goto done;
    if (k <= 0 || k % 8 || codes.len % k || words.len * 2 != codes.len || first < 0 || first > last || last > codes.len / k) {
        PyErr_SetString(PyExc_ValueError, "codes are rows of k, a multiple of 8, and half as many bytes of words; first and last are of the rows");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    levels[level].pack((const uint8_t *)codes.buf + first * k, (uint8_t *)words.buf + (Py_ssize_t)sizeof(uint32_t) * first,
                       (size_t)(last - first), (size_t)k, (size_t)(codes.len / k));
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&codes);
    PyBuffer_Release(&words);
    return result;
}

static PyMethodDef methods[] = {
    {"round", py_round, METH_VARARGS, "round(level, weight, codes, scales, factors, importance, first): fills codes and scales, buffers of bytes."},
    {"pack", py_pack, METH_VARARGS, "pack(level, codes, words, k, first, last): fills the words of these rows; all are buffers of bytes."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_int4", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__int4(void)
{
    return module_with_levels(&definition);
}
