/* The arithmetic of nvfp4.py (block_scales, encode, pack), the largest magnitude of a matrix, and the search for scales, compiled.
 *
 * In: buffers of BF16 numbers, and which level of vector instructions to use. Out: the same bits as the eager PyTorch
 * definition, for every input; tests/formats/test_nvfp4_packing.py holds the two together. Leaves out: tensors and threads
 * (nvfp4_packing.py); the interpreter lock is released, so pieces of one matrix can be packed at once.
 *
 * The loops are plain C with fixed trip counts, written so that compilers turn them into vector code; each level compiles
 * the same source for another target. Every float32 operation rounds as in PyTorch: no fast-math, no fused multiply-add.
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
#error "two BF16 numbers are read as one little-endian word"
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
    BLOCK = 16,               /* numbers that share a scale */
    WORDS = BLOCK / 2,        /* 32-bit words of two numbers; a word becomes a byte of two codes */
    BLOCK_BYTES = 2 * BLOCK,
    TILE = 64,                /* blocks at once: long enough to vectorize over blocks, short enough for the first cache */
};

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

/* Word i of a piece of the matrix, which may start at any address. */
INLINE uint32_t load(const uint8_t *weight, int i)
{
    uint32_t word;
    memcpy(&word, weight + sizeof word * (size_t)i, sizeof word);
    return word;
}

/* The larger BF16 magnitude of a word's two numbers, as an integer: NaN > infinity > every number, as torch.amax has it. */
INLINE int32_t larger_magnitude(uint32_t word)
{
    int32_t even = (int32_t)(word & 0x7fffu), odd = (int32_t)(word >> 16 & 0x7fffu);
    return even > odd ? even : odd;
}

/* E2M1 code of a number that is divided by its scales; a NaN becomes 0. */
INLINE uint32_t encode(float scaled)
{
    float size = fabsf(scaled);
    uint32_t code = size > 0.25f;
    code += size >= 0.75f;
    code += size > 1.25f;
    code += size >= 1.75f;
    code += size > 2.5f;
    code += size >= 3.5f;
    code += size > 5.0f;
    return code + (scaled < 0.0f ? 8u : 0u);
}

/* What E4M3 can hold of a scale; 1 for zero, a NaN stays. */
INLINE float clamped(float scale)
{
    scale = scale == 0.0f ? 1.0f : scale;
    scale = scale < 0x1p-9f ? 0x1p-9f : scale;
    return scale > 448.0f ? 448.0f : scale;
}

/* E4M3 code of a scale between 2^-9 and 448 or NaN, to nearest, ties to even; *value is the scale that the code stands for. */
INLINE uint32_t encode_scale(float scale, float *value)
{
    const float shift = 16384.0f; /* its float32 neighbours are 2^-9 apart, as E4M3's subnormals are: the sum is rounded for us */
    uint32_t bits = as_bits(scale);
    uint32_t normal = bits + 0x7ffffu + (bits >> 20 & 1u);
    float shifted = scale + shift;
    uint32_t code = scale < 0x1p-6f ? as_bits(shifted) - as_bits(shift) : (normal >> 20) - ((127 - 7) << 3);
    float rounded = scale < 0x1p-6f ? shifted - shift : as_float(normal & 0xfff00000u);
    *value = scale != scale ? scale : rounded;
    return scale != scale ? 0x7fu | (bits >> 24 & 0x80u) : code;
}

#include "_nvfp4_search.h"

INLINE void scale_tile(const uint8_t *restrict weight, uint8_t *restrict scales, float *restrict step, float scale_2)
{
    float divisor = 6.0f * scale_2;
    int32_t amax[TILE];
    for (int b = 0; b < TILE; b++) {
        int32_t largest = 0;
        for (int i = 0; i < WORDS; i++) {
            int32_t size = larger_magnitude(load(weight, b * WORDS + i));
            largest = size > largest ? size : largest;
        }
        amax[b] = largest;
    }
    for (int b = 0; b < TILE; b++) {
        float value;
        scales[b] = (uint8_t)encode_scale(clamped(as_float((uint32_t)amax[b] << 16) / divisor), &value);
        step[b] = value * scale_2;
    }
}

/* given: whether scales are read, and not made of the largest magnitudes. */
INLINE void pack_tile(const uint8_t *restrict weight, uint8_t *restrict packed, uint8_t *restrict scales, float scale_2, int given)
{
    float step[TILE];
    uint32_t codes[TILE * WORDS];
    if (given)
        for (int b = 0; b < TILE; b++)
            step[b] = scale_value(scales[b]) * scale_2;
    else
        scale_tile(weight, scales, step, scale_2);
    for (int b = 0; b < TILE; b++) {
        for (int i = 0; i < WORDS; i++) {
            uint32_t word = load(weight, b * WORDS + i);
            uint32_t even = encode(as_float(word << 16) / step[b]), odd = encode(as_float(word & 0xffff0000u) / step[b]);
            codes[b * WORDS + i] = even | odd << 4;
        }
    }
    for (int i = 0; i < TILE * WORDS; i++)
        packed[i] = (uint8_t)codes[i];
}

INLINE void pack_blocks(const uint8_t *weight, uint8_t *packed, uint8_t *scales, size_t blocks, float scale_2, int given)
{
    size_t b = 0;
    for (; b + TILE <= blocks; b += TILE)
        pack_tile(weight + b * BLOCK_BYTES, packed + b * WORDS, scales + b, scale_2, given);
    if (b < blocks) {
        uint8_t last[TILE * BLOCK_BYTES] = {0}, last_packed[TILE * WORDS], last_scales[TILE] = {0};
        memcpy(last, weight + b * BLOCK_BYTES, (blocks - b) * BLOCK_BYTES);
        memcpy(last_scales, scales + b, blocks - b);
        pack_tile(last, last_packed, last_scales, scale_2, given);
        memcpy(packed + b * WORDS, last_packed, (blocks - b) * WORDS);
        memcpy(scales + b, last_scales, blocks - b);
    }
}

INLINE uint32_t largest_bits(const uint8_t *weight, size_t numbers)
{
    uint16_t piece[1024];
    int16_t largest[64] = {0}; /* 16-bit lanes; signed, which SSE2 can compare too */
    const size_t at_once = sizeof piece / sizeof *piece;
    for (size_t start = 0; start < numbers; start += at_once) {
        size_t count = numbers - start < at_once ? numbers - start : at_once;
        if (count < at_once)
            memset(piece, 0, sizeof piece);
        memcpy(piece, weight + start * sizeof *piece, count * sizeof *piece);
        for (size_t i = 0; i < at_once; i += 64) {
            for (int lane = 0; lane < 64; lane++) {
                int16_t size = (int16_t)(piece[i + lane] & 0x7fffu);
                largest[lane] = size > largest[lane] ? size : largest[lane];
            }
        }
    }
    uint32_t result = 0;
    for (int lane = 0; lane < 64; lane++)
        result = (uint32_t)largest[lane] > result ? (uint32_t)largest[lane] : result;
    return result;
}

typedef void pack_function(const uint8_t *weight, uint8_t *packed, uint8_t *scales, size_t blocks, float scale_2, int given);
typedef uint32_t amax_function(const uint8_t *weight, size_t numbers);
typedef void search_function(
    const uint8_t *weight, const float *forms, uint8_t *scales, size_t rows, size_t blocks, float scale_2, int below, int above);

#define LEVEL(name, target)                                                                                                   \
    target static void pack_##name(const uint8_t *weight, uint8_t *packed, uint8_t *scales, size_t blocks, float s, int given) \
    {                                                                                                                         \
        if (given)                                                                                                            \
            pack_blocks(weight, packed, scales, blocks, s, 1);                                                                \
        else                                                                                                                  \
            pack_blocks(weight, packed, scales, blocks, s, 0);                                                                \
    }                                                                                                                         \
    target static uint32_t amax_##name(const uint8_t *weight, size_t numbers)                                                 \
    {                                                                                                                         \
        return largest_bits(weight, numbers);                                                                                 \
    }                                                                                                                         \
    target static void search_##name(                                                                                         \
        const uint8_t *weight, const float *forms, uint8_t *scales, size_t rows, size_t blocks, float s, int below, int above) \
    {                                                                                                                         \
        search_rows(weight, forms, scales, rows, blocks, s, below, above);                                                    \
    }

LEVEL(generic, )
#if defined(__GNUC__) && defined(__x86_64__)
#define X86
LEVEL(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
LEVEL(avx2, __attribute__((target("avx2"))))
#endif

static const struct {
    const char *name;
    pack_function *pack;
    amax_function *amax;
    search_function *search;
} levels[] = {
#ifdef X86
    {"avx512", pack_avx512, amax_avx512, search_avx512},
    {"avx2", pack_avx2, amax_avx2, search_avx2},
#endif
    {"generic", pack_generic, amax_generic, search_generic},
};
#include "_levels.h"

static PyObject *py_pack(PyObject *module, PyObject *args)
{
    const char *name;
    double scale_2;
    int given;
    Py_buffer weight, packed, scales;
    (void)module;
    if (!PyArg_ParseTuple(args, "sdpy*w*w*", &name, &scale_2, &given, &weight, &packed, &scales))
        return NULL;
    PyObject *result = NULL;
    int level = find_level(name);
    if (level < 0)
        goto done;
    if (weight.len != scales.len * BLOCK_BYTES || packed.len != scales.len * WORDS) {
        PyErr_SetString(PyExc_ValueError, "a block is 32 bytes of weight, 8 of codes and 1 of scales");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    levels[level].pack(weight.buf, packed.buf, scales.buf, (size_t)scales.len, (float)scale_2, given);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&weight);
    PyBuffer_Release(&packed);
    PyBuffer_Release(&scales);
    return result;
}

static PyObject *py_amax(PyObject *module, PyObject *args)
{
    const char *name;
    Py_buffer weight;
    (void)module;
    if (!PyArg_ParseTuple(args, "sy*", &name, &weight))
        return NULL;
    PyObject *result = NULL;
    int level = find_level(name);
    if (level >= 0) {
        uint32_t bits;
        Py_BEGIN_ALLOW_THREADS
        bits = levels[level].amax(weight.buf, (size_t)weight.len / 2);
        Py_END_ALLOW_THREADS
        result = PyLong_FromUnsignedLong(bits);
    }
    PyBuffer_Release(&weight);
    return result;
}

static PyObject *py_search(PyObject *module, PyObject *args)
{
    const char *name;
    double scale_2;
    int below, above;
    Py_ssize_t blocks;
    Py_buffer weight, forms, scales;
    (void)module;
    if (!PyArg_ParseTuple(args, "sdiiny*y*w*", &name, &scale_2, &below, &above, &blocks, &weight, &forms, &scales))
        return NULL;
    PyObject *result = NULL;
    int level = find_level(name);
    if (level < 0)
        goto done;
    if (blocks <= 0 || scales.len % blocks || weight.len != scales.len * BLOCK_BYTES ||
        (forms.len && forms.len != blocks * FORM * (Py_ssize_t)sizeof(float))) {
        PyErr_SetString(PyExc_ValueError, "a block is 32 bytes of weight, 1 of scales and 256 numbers of a form or none; rows are whole");
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    levels[level].search(weight.buf, forms.len ? forms.buf : NULL, scales.buf, (size_t)(scales.len / blocks), (size_t)blocks,
                         (float)scale_2, below, above);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&weight);
    PyBuffer_Release(&forms);
    PyBuffer_Release(&scales);
    return result;
}

static PyMethodDef methods[] = {
    {"pack", py_pack, METH_VARARGS,
     "pack(level, scale_2, given, weight, packed, scales): fills packed and, unless they are given, scales; buffers of bytes."},
    {"search", py_search, METH_VARARGS,
     "search(level, scale_2, below, above, blocks of a row, weight, forms, scales): fills scales; buffers of bytes and of float32."},
    {"amax", py_amax, METH_VARARGS, "amax(level, weight): BF16 bits of the largest magnitude; from 0x7f80 on infinite or NaN."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_nvfp4", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__nvfp4(void)
{
    return module_with_levels(&definition);
}
