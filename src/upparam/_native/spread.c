/* upparam._native.spread: stored factors in float32, each element times a number in double and rounded once, with room between rows.
 *
 * Every instruction set gives the same numbers. The GIL is released meanwhile.
 */

#include "native.h"

#define INTERFACE 1 /* counts changes of what Python passes: a module built from older source is not used */

enum { BFLOAT, HALF, SINGLE };

static inline float widened(const void *stored, Py_ssize_t at, int kind)
{
    float value;
    uint32_t bits;
    if (kind == SINGLE) {
        memcpy(&value, (const char *)stored + 4 * at, sizeof value);
        return value;
    }
    uint16_t code;
    memcpy(&code, (const char *)stored + 2 * at, sizeof code);
    bits = (uint32_t)code << 16;
    if (kind == HALF) {
        uint32_t magnitude = (uint32_t)(code & 0x7FFFu) << 13, sign = bits & 0x80000000u;
        memcpy(&value, &magnitude, sizeof value);
        value *= 5.192296858534828e+33f; /* 2^112: moves the exponent, subnormals included */
        memcpy(&bits, &value, sizeof bits);
        if (magnitude >= 0x0F800000u) /* infinities and NaNs */
            bits = 0x7F800000u | magnitude;
        bits |= sign;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

typedef void (*row_function)(char *, const void *, Py_ssize_t, Py_ssize_t, int, double);

/* `count` elements from number `from` on. */
static void row_portable(char *to, const void *stored, Py_ssize_t from, Py_ssize_t count, int kind, double factor)
{
    for (Py_ssize_t at = 0; at < count; at++) {
        float value = (float)((double)widened(stored, from + at, kind) * factor);
        memcpy(to + 4 * at, &value, sizeof value);
    }
}

#ifdef X86
__attribute__((target("avx2,f16c"))) static void row_avx2(char *to, const void *stored, Py_ssize_t from, Py_ssize_t count, int kind, double factor)
{
    const __m256d times = _mm256_set1_pd(factor);
    Py_ssize_t at = 0;
    for (; at + 8 <= count; at += 8) {
        __m256 value;
        if (kind == SINGLE)
            value = _mm256_loadu_ps((const float *)stored + from + at);
        else {
            __m128i codes = _mm_loadu_si128((const __m128i *)((const uint16_t *)stored + from + at));
            value = kind == HALF ? _mm256_cvtph_ps(codes) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(codes), 16));
        }
        __m128 low = _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(value)), times));
        __m128 high = _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)), times));
        _mm256_storeu_ps((float *)(to + 4 * at), _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1));
    }
    row_portable(to + 4 * at, stored, from + at, count - at, kind, factor);
}
#endif

static row_function row;

/* spread(out, offset, stride, stored, kind, rows, count, factor)
 *
 * `rows` rows of `count` elements, kind 0 bfloat16, 1 float16, 2 float32, become float32 in `out`: the first at byte `offset`, the next
 * `stride` bytes further on. */
static PyObject *spread(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer out, stored;
    Py_ssize_t offset, stride, rows, count;
    int kind;
    double factor;
    if (!PyArg_ParseTuple(args, "w*nny*innd", &out, &offset, &stride, &stored, &kind, &rows, &count, &factor))
        return NULL;
    const Py_ssize_t limit = (Py_ssize_t)1 << 40;
    int fits = kind >= BFLOAT && kind <= SINGLE && rows >= 0 && count >= 0 && offset >= 0 && stride >= 0 && rows < limit && count < limit / 8
               && offset < limit && stride < limit
               && (!rows || !count
                   || (rows <= stored.len / (count * (kind == SINGLE ? 4 : 2)) && offset + count * 4 <= out.len
                       && (rows == 1 || !stride || rows - 1 <= (out.len - offset - count * 4) / stride)));
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t at = 0; at < rows; at++)
            row((char *)out.buf + offset + at * stride, stored.buf, at * count, count, kind, factor);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&out);
    PyBuffer_Release(&stored);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "spread: a buffer is too small");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"spread", spread, METH_VARARGS, "Stored factors times a number as float32, with room between rows; see spread.c."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "spread", "Stored factors times a number.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_spread(void)
{
    row = row_portable;
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) /* every processor with both has f16c */
        row = row_avx2;
#endif
    PyObject *made = PyModule_Create(&definition);
    if (made && PyModule_AddIntConstant(made, "INTERFACE", INTERFACE) < 0)
        Py_CLEAR(made);
    return made;
}
