/* The arithmetic of rounding/signround.py (dequantize, codes, step), compiled.
 *
 * In: buffers of a matrix, its rounding offsets, its scales and a gradient, and which level of vector instructions to use. Out:
 * the same bits as the eager PyTorch definition, for every finite input; tests/rounding/test_signround.py holds the two together.
 * Leaves out: tensors and threads (rounding/signround_kernel.py); the interpreter lock is released.
 *
 * Plain C with fixed trip counts, compiled for several targets, as in _nvfp4.c. Every float32 operation rounds as in PyTorch, and
 * sums are added in the order that the definition gives: no fast-math, no fused multiply-add.
 */
#define Py_LIMITED_API 0x030B0000 /* one binary for every CPython from 3.11 on */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "fast-math changes the bits"
#endif
#if FLT_EVAL_METHOD != 0
#error "float32 operations must round to float32"
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

enum {
    GROUP = 128, /* numbers that share a scale */
    LANES = 16,  /* partial sums of a group */
};
static const float UNIT = 1.0f / 40000.0f; /* of an offset */
static const float TO_INTEGER = 12582912.0f; /* its float32 neighbours are 1 apart: a small sum with it is rounded for us, ties to even */

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

INLINE float from_bf16(uint16_t bits)
{
    return as_float((uint32_t)bits << 16);
}

INLINE uint16_t to_bf16(float value)
{
    uint32_t bits = as_bits(value);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* w / scale + offset, between -9 and 8, plus TO_INTEGER: its last bits are the rounded integer, -9 and 8 where a code would be clipped. */
INLINE float shifted(float quotient, int16_t offset)
{
    float x = quotient + (float)offset * UNIT;
    x = x < -9.0f ? -9.0f : x;
    x = x > 8.0f ? 8.0f : x;
    return x + TO_INTEGER;
}

INLINE float clipped(float integer)
{
    integer = integer < -8.0f ? -8.0f : integer;
    return integer > 7.0f ? 7.0f : integer;
}

INLINE void dequantize_groups(const uint16_t *restrict weight, const int16_t *restrict offset, const float *restrict scale,
                              uint16_t *restrict out, size_t groups)
{
    for (size_t g = 0; g < groups; g++, weight += GROUP, offset += GROUP, out += GROUP) {
        float s = scale[g];
        for (int i = 0; i < GROUP; i++)
            out[i] = to_bf16(s * clipped(shifted(from_bf16(weight[i]) / s, offset[i]) - TO_INTEGER));
    }
}

/* Two codes a byte, the first in the lower half; a code is the clipped integer plus 8. */
INLINE void codes_groups(const uint16_t *restrict weight, const int16_t *restrict offset, const float *restrict scale,
                         uint8_t *restrict out, size_t groups)
{
    for (size_t g = 0; g < groups; g++, weight += GROUP, offset += GROUP, out += GROUP / 2) {
        float s = scale[g];
        uint8_t codes[GROUP];
        for (int i = 0; i < GROUP; i++) {
            float integer = clipped(shifted(from_bf16(weight[i]) / s, offset[i]) - TO_INTEGER);
            codes[i] = (uint8_t)((as_bits(integer + TO_INTEGER) & 15u) ^ 8u);
        }
        for (int i = 0; i < GROUP / 2; i++)
            out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    }
}

/* Moves offsets against the gradient's sign; sums[g] is the gradient of the group's scale. */
INLINE void step_groups(const uint16_t *restrict weight, int16_t *restrict offset, const float *restrict scale,
                        const uint16_t *restrict grad, float *restrict sums, size_t groups, int32_t step)
{
    for (size_t g = 0; g < groups; g++, weight += GROUP, offset += GROUP, grad += GROUP) {
        float s = scale[g], part[GROUP], sum[LANES] = {0};
        int32_t towards = s < 0.0f ? -step : step;
        for (int i = 0; i < GROUP; i++) {
            float d = from_bf16(grad[i]), quotient = from_bf16(weight[i]) / s;
            float integer = shifted(quotient, offset[i]) - TO_INTEGER, code = clipped(integer);
            uint32_t inside = 0u - (uint32_t)(integer == code); /* all bits, as branches are not made into vector code */
            part[i] = d * (code - as_float(as_bits(quotient) & inside));
            int32_t sign = (int32_t)(d > 0.0f) - (int32_t)(d < 0.0f);
            int32_t moved = offset[i] - (int32_t)((uint32_t)(sign * towards) & inside);
            moved = moved < -32768 ? -32768 : moved;
            offset[i] = (int16_t)(moved > 32767 ? 32767 : moved);
        }
        for (int start = 0; start < GROUP; start += LANES)
            for (int lane = 0; lane < LANES; lane++)
                sum[lane] = sum[lane] + part[start + lane];
        for (int half = LANES / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; lane++)
                sum[lane] = sum[lane] + sum[lane + half];
        sums[g] = sum[0];
    }
}

typedef void dequantize_function(const uint16_t *, const int16_t *, const float *, uint16_t *, size_t);
typedef void codes_function(const uint16_t *, const int16_t *, const float *, uint8_t *, size_t);
typedef void step_function(const uint16_t *, int16_t *, const float *, const uint16_t *, float *, size_t, int32_t);

#define LEVEL(name, target)                                                                                                  \
    target static void dequantize_##name(const uint16_t *w, const int16_t *v, const float *s, uint16_t *out, size_t groups)  \
    {                                                                                                                        \
        dequantize_groups(w, v, s, out, groups);                                                                             \
    }                                                                                                                        \
    target static void codes_##name(const uint16_t *w, const int16_t *v, const float *s, uint8_t *out, size_t groups)        \
    {                                                                                                                        \
        codes_groups(w, v, s, out, groups);                                                                                  \
    }                                                                                                                        \
    target static void step_##name(const uint16_t *w, int16_t *v, const float *s, const uint16_t *d, float *sums, size_t groups, \
                                   int32_t step)                                                                             \
    {                                                                                                                        \
        step_groups(w, v, s, d, sums, groups, step);                                                                         \
    }

LEVEL(generic, )
#if defined(__GNUC__) && defined(__x86_64__)
#define X86
LEVEL(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
LEVEL(avx2, __attribute__((target("avx2"))))
#endif

static const struct {
    const char *name;
    dequantize_function *dequantize;
    codes_function *codes;
    step_function *step;
} levels[] = {
#ifdef X86
    {"avx512", dequantize_avx512, codes_avx512, step_avx512},
    {"avx2", dequantize_avx2, codes_avx2, step_avx2},
#endif
    {"generic", dequantize_generic, codes_generic, step_generic},
};
#include "_levels.h"

/* Number of groups of buffers that hold `bytes[i]` bytes a group, or -1 with ValueError set where they differ. */
static Py_ssize_t count_groups(const Py_buffer *buffers, const int *bytes, int count)
{
    Py_ssize_t groups = buffers[0].len / bytes[0];
    for (int i = 0; i < count; i++) {
        if (buffers[i].len != groups * bytes[i]) {
            PyErr_SetString(PyExc_ValueError, "the buffers are not of the same number of groups of 128");
            return -1;
        }
    }
    return groups;
}

static PyObject *released(Py_buffer *buffers, int count, int done)
{
    for (int i = 0; i < count; i++)
        PyBuffer_Release(&buffers[i]);
    return done ? Py_NewRef(Py_None) : NULL;
}

static PyObject *py_dequantize(PyObject *module, PyObject *args)
{
    static const int bytes[] = {2 * GROUP, 2 * GROUP, 4, 2 * GROUP};
    const char *name;
    Py_buffer b[4];
    (void)module;
    if (!PyArg_ParseTuple(args, "sy*y*y*w*", &name, &b[0], &b[1], &b[2], &b[3]))
        return NULL;
    int level = find_level(name);
    Py_ssize_t groups = level < 0 ? -1 : count_groups(b, bytes, 4);
    if (groups >= 0) {
        Py_BEGIN_ALLOW_THREADS
        levels[level].dequantize(b[0].buf, b[1].buf, b[2].buf, b[3].buf, (size_t)groups);
        Py_END_ALLOW_THREADS
    }
    return released(b, 4, groups >= 0);
}

static PyObject *py_codes(PyObject *module, PyObject *args)
{
    static const int bytes[] = {2 * GROUP, 2 * GROUP, 4, GROUP / 2};
    const char *name;
    Py_buffer b[4];
    (void)module;
    if (!PyArg_ParseTuple(args, "sy*y*y*w*", &name, &b[0], &b[1], &b[2], &b[3]))
        return NULL;
    int level = find_level(name);
    Py_ssize_t groups = level < 0 ? -1 : count_groups(b, bytes, 4);
    if (groups >= 0) {
        Py_BEGIN_ALLOW_THREADS
        levels[level].codes(b[0].buf, b[1].buf, b[2].buf, b[3].buf, (size_t)groups);
        Py_END_ALLOW_THREADS
    }
    return released(b, 4, groups >= 0);
}

static PyObject *py_step(PyObject *module, PyObject *args)
{
    static const int bytes[] = {2 * GROUP, 2 * GROUP, 4, 2 * GROUP, 4};
    const char *name;
    int step;
    Py_buffer b[5];
    (void)module;
    if (!PyArg_ParseTuple(args, "siy*w*y*y*w*", &name, &step, &b[0], &b[1], &b[2], &b[3], &b[4]))
        return NULL;
    int level = find_level(name);
    Py_ssize_t groups = level < 0 ? -1 : count_groups(b, bytes, 5);
    if (groups >= 0) {
        Py_BEGIN_ALLOW_THREADS
        levels[level].step(b[0].buf, b[1].buf, b[2].buf, b[3].buf, b[4].buf, (size_t)groups, (int32_t)step);
        Py_END_ALLOW_THREADS
    }
    return released(b, 5, groups >= 0);
}

static PyMethodDef methods[] = {
    {"dequantize", py_dequantize, METH_VARARGS, "dequantize(level, weight, offset, scale, out): fills out with BF16 numbers."},
    {"codes", py_codes, METH_VARARGS, "codes(level, weight, offset, scale, out): fills out with two codes a byte."},
    {"step", py_step, METH_VARARGS, "step(level, step, weight, offset, scale, grad, sums): moves offset, fills sums."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_signround", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__signround(void)
{
    return module_with_levels(&definition);
}
