/* upparam._native.tile: one tile of a stored weight becomes round(W + up @ down) in place, for 16-bit and float32 weights.
 *
 * Every element whose rounding float32 (for float32 weights: float64) sums cannot decide is left as it was and reported; the caller
 * settles those few in float64. So results do not depend on the instruction set, and equal those of the numpy path byte for byte.
 * The instruction set is chosen when the module is loaded. No state; the GIL is released while a tile is worked on.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define X86 1
#endif

#if !defined(__GNUC__)
#error "needs the vector extensions of GCC or Clang; without them upparam uses numpy"
#endif

#define CHUNK 16
#define GROUP_BYTES (16 << 10)
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

#define ROWS 4
#define LANES 4
#define SET portable
#define NAME(x) JOIN(x, portable)
#define TARGET
#define FMA(a, b, c) ((a) * (b) + (c))
#define FMAD(a, b, c) ((a) * (b) + (c))
#include "tile_kernels.h"
#undef ROWS
#undef LANES
#undef NAME
#undef TARGET
#undef FMA
#undef FMAD
#undef LANE_BITS
#undef NARROW

#ifdef X86
#define ROWS 6
#define LANES 8
#define NAME(x) JOIN(x, avx2)
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define FMA(a, b, c) ((VF)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FMAD(a, b, c) ((VD)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define LANE_BITS(mask) ((uint32_t)_mm256_movemask_ps((__m256)(mask)))
#define NARROW(codes) __builtin_convertvector(codes, VH)
#define HALF_UP(code) ((VF)_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128((__m256i)(code)), _mm256_extracti128_si256((__m256i)(code), 1))))
#define HALF_DOWN(a) ((VU)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)(a), _MM_FROUND_TO_NEAREST_INT)))
#include "tile_kernels.h"
#undef ROWS
#undef LANES
#undef NAME
#undef TARGET
#undef FMA
#undef FMAD
#undef LANE_BITS
#undef NARROW
#undef HALF_UP
#undef HALF_DOWN

#define ROWS 6
#define LANES 16
#define NAME(x) JOIN(x, avx512)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

/* What block16 does to 32 elements of one row when it is exact, with masks: w += sum where that is certain. Answers which are not. The
 * ends of the interval are taken with their signs: one on each side of zero never round alike. */
TARGET static inline __attribute__((always_inline)) uint32_t finish_avx512(
    uint16_t *w, __m512 sum0, __m512 sum1, float row_bound, const float *column_norm, int half, long *changed)
{
    const __m512 limit = _mm512_set1_ps(half ? 65472.0f : 3.36e38f), part_of_a = _mm512_set1_ps(1.8e-07f), tiny = _mm512_set1_ps(2e-37f);
    const __m512 bound = _mm512_set1_ps(row_bound);
    __m512i old = _mm512_loadu_si512(w), code;
    __m512 v0, v1;
    if (half) {
        v0 = _mm512_cvtph_ps(_mm512_castsi512_si256(old));
        v1 = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(old, 1));
    } else {
        const __m512i first = _mm512_set_epi16(
            15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
        const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
        v0 = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, first, old));
        v1 = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, second, old));
    }
    v0 = _mm512_add_ps(v0, sum0);
    v1 = _mm512_add_ps(v1, sum1);
    __m512 a0 = _mm512_abs_ps(v0), a1 = _mm512_abs_ps(v1);
    __m512 reach0 = _mm512_fmadd_ps(a0, part_of_a, _mm512_fmadd_ps(_mm512_loadu_ps(column_norm), bound, tiny));
    __m512 reach1 = _mm512_fmadd_ps(a1, part_of_a, _mm512_fmadd_ps(_mm512_loadu_ps(column_norm + 16), bound, tiny));
    __m512 low0 = _mm512_sub_ps(v0, reach0), high0 = _mm512_add_ps(v0, reach0);
    __m512 low1 = _mm512_sub_ps(v1, reach1), high1 = _mm512_add_ps(v1, reach1);
    __mmask32 doubt = _mm512_kunpackw(_mm512_cmp_ps_mask(a1, limit, _CMP_NLE_UQ), _mm512_cmp_ps_mask(a0, limit, _CMP_NLE_UQ));
    if (half) {
        const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(low0, nearest)), _mm512_cvtps_ph(low1, nearest), 1);
        code = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(high0, nearest)), _mm512_cvtps_ph(high1, nearest), 1);
        doubt |= _mm512_cmpneq_epi16_mask(low, code);
    } else { /* ties lie strictly between the ends, so rounding them away from zero is as good as to even */
        const __m512i halfway = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xFFFF0000u);
        const __m512i odd = _mm512_set_epi16(
            63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        __m512i up0 = _mm512_add_epi32(_mm512_castps_si512(high0), halfway), up1 = _mm512_add_epi32(_mm512_castps_si512(high1), halfway);
        __m512i under0 = _mm512_add_epi32(_mm512_castps_si512(low0), halfway), under1 = _mm512_add_epi32(_mm512_castps_si512(low1), halfway);
        doubt |= _mm512_kunpackw(
            _mm512_test_epi32_mask(_mm512_xor_si512(up1, under1), upper), _mm512_test_epi32_mask(_mm512_xor_si512(up0, under0), upper));
        code = _mm512_permutex2var_epi16(up0, odd, up1);
    }
    code = _mm512_mask_mov_epi16(code, doubt, old);
    *changed += __builtin_popcount(_mm512_cmpneq_epi16_mask(code, old));
    _mm512_storeu_si512(w, code);
    return doubt;
}
#define FINISH(w, sum, bound, norm, half, changed) finish_avx512(w, (__m512)(sum)[0], (__m512)(sum)[1], bound, norm, half, changed)
#define FMA(a, b, c) ((VF)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FMAD(a, b, c) ((VD)_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define LANE_BITS(mask) ((uint32_t)_mm512_movepi32_mask((__m512i)(mask)))
#define NARROW(codes) ((VH)_mm512_cvtepi32_epi16((__m512i)(codes)))
#define HALF_UP(code) ((VF)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(code))))
#define HALF_DOWN(a) ((VU)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)))
#include "tile_kernels.h"
#undef HALF_UP
#undef HALF_DOWN
#undef FINISH
#endif

typedef long (*tile16_function)(uint16_t *, long, long, const float *, const float *, long, const float *, const float *, int, int, uint32_t *, long *);
typedef long (*tile32_function)(float *, long, long, const double *, const double *, long, const float *, const float *, int, int, uint32_t *, long *);

typedef struct {
    const char *name;
    int lanes;
    tile16_function tile16;
    tile32_function tile32;
} InstructionSet;

static InstructionSet sets[3];
static int set_count;

static void find_sets(void)
{
    set_count = 0;
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets[set_count++] = (InstructionSet){"avx512", 16, tile16_avx512, tile32_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        sets[set_count++] = (InstructionSet){"avx2", 8, tile16_avx2, tile32_avx2};
#endif
    sets[set_count++] = (InstructionSet){"portable", 4, tile16_portable, tile32_portable};
}

/* merge_tile(stored, rows, columns, up, panels, rank, row_bound, column_norm, kind, exact, doubtful, set) -> (doubtful, changed)
 *
 * kind: 0 bfloat16, 1 float16, 2 float32. Buffers are checked for size; `doubtful` (uint32) has room for every element. The
 * answer is how many entries of `doubtful` were filled and how many of the other elements changed. */
static PyObject *merge_tile(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer stored, up, panels, bounds, norms, doubtful;
    Py_ssize_t rows, columns, rank;
    int kind, exact, set;
    PyObject *answer = NULL;
    if (!PyArg_ParseTuple(
            args, "w*nny*y*ny*y*iiw*i", &stored, &rows, &columns, &up, &panels, &rank, &bounds, &norms, &kind, &exact, &doubtful, &set))
        return NULL;
    if (set < 0 || set >= set_count || kind < 0 || kind > 2 || rows < 0 || columns < 0 || rank < 0) {
        PyErr_SetString(PyExc_ValueError, "merge_tile: no such kind or instruction set");
        goto done;
    }
    Py_ssize_t element = kind == 2 ? 4 : 2, factor = kind == 2 ? 8 : 4;
    Py_ssize_t width = kind == 2 ? sets[set].lanes : 2 * sets[set].lanes;
    Py_ssize_t padded = (columns + width - 1) / width * width;
    if (stored.len < rows * columns * element || up.len < rows * rank * factor || panels.len < padded * rank * factor
        || bounds.len < rows * 4 || norms.len < padded * 4 || doubtful.len < rows * columns * 4) {
        PyErr_SetString(PyExc_ValueError, "merge_tile: a buffer is too small");
        goto done;
    }
    long found, changed = 0;
    Py_BEGIN_ALLOW_THREADS
    if (kind == 2)
        found = sets[set].tile32(stored.buf, rows, columns, up.buf, panels.buf, rank, bounds.buf, norms.buf, 0, exact, doubtful.buf, &changed);
    else
        found = sets[set].tile16(stored.buf, rows, columns, up.buf, panels.buf, rank, bounds.buf, norms.buf, kind == 1, exact, doubtful.buf, &changed);
    Py_END_ALLOW_THREADS
    answer = Py_BuildValue("ll", found, changed);
done:
    PyBuffer_Release(&stored);
    PyBuffer_Release(&up);
    PyBuffer_Release(&panels);
    PyBuffer_Release(&bounds);
    PyBuffer_Release(&norms);
    PyBuffer_Release(&doubtful);
    return answer;
}

/* Rounding of one double to nearest even in a 16-bit type: to odd in float first, which keeps on which side of a tie it lies. */
static uint16_t rounded16(double value, int half)
{
    float nearest = (float)value;
    uint32_t bits;
    memcpy(&bits, &nearest, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7FFFFFFFu;
    double magnitude = sign ? -value : value, back = sign ? -(double)nearest : (double)nearest;
    if (bits < 0x7F800000u && back != magnitude)
        bits = (bits - (back > magnitude)) | 1u;
    if (!half)
        return (uint16_t)(sign | (bits >= 0x7F800000u ? 0x7F80u : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16));
    if (bits >= 0x47800000u) /* 65536 and up */
        return (uint16_t)(sign | 0x7C00u);
    if (bits < 0x38800000u) { /* below 2^-14: adding 0.5 rounds to the spacing of fp16 subnormals */
        float small, sum;
        memcpy(&small, &bits, sizeof small);
        sum = small + 0.5f;
        memcpy(&bits, &sum, sizeof bits);
        return (uint16_t)(sign | (bits - 0x3F000000u));
    }
    return (uint16_t)(sign | (bits + 0xFFFu + (bits >> 13 & 1u) - (112u << 23)) >> 13);
}

static double stored16(uint16_t code, int half)
{
    uint32_t bits = (uint32_t)code << 16;
    float value;
    if (half) {
        uint32_t magnitude = (uint32_t)(code & 0x7FFFu) << 13;
        memcpy(&value, &magnitude, sizeof value);
        double wide = (double)value * 5.192296858534828e+33; /* 2^112 */
        if ((code & 0x7C00u) == 0x7C00u)
            wide = (code & 0x3FFu) ? __builtin_nan("") : __builtin_inf();
        return code & 0x8000u ? -wide : wide;
    }
    memcpy(&value, &bits, sizeof value);
    return (double)value;
}

/* settle(stored, flat, count, columns, up, down, rank, kind) -> (changed, infinite)
 *
 * The elements flat[n] of a tile become round(W + sum_k up[row, k] * down[column, k]), summed in float64. The order is fixed, and the
 * numpy path uses the same: eight running sums over k = 0, 8, 16 ...; 1, 9, 17 ... and so on, then ((0 + 4) + (2 + 6)) + ((1 + 5) +
 * (3 + 7)). This file is compiled without contraction, so no product is fused. NaN in the weight stays as it is. */
static PyObject *settle(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer stored, flat, up, down;
    Py_ssize_t count, columns, rank;
    int kind;
    if (!PyArg_ParseTuple(args, "w*y*nny*y*ni", &stored, &flat, &count, &columns, &up, &down, &rank, &kind))
        return NULL;
    int fits = count >= 0 && columns > 0 && rank >= 0 && rank % 8 == 0 && kind >= 0 && kind <= 2 && flat.len >= count * 4;
    const uint32_t *places = flat.buf;
    for (Py_ssize_t n = 0; fits && n < count; n++) {
        Py_ssize_t at = places[n];
        fits = (at / columns + 1) * rank * 8 <= up.len && (at % columns + 1) * rank * 8 <= down.len && (at + 1) * (kind == 2 ? 4 : 2) <= stored.len;
    }
    long changed = 0, infinite = 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        const double *ups = up.buf, *downs = down.buf;
        uint32_t wide = (uint32_t)columns;
        for (Py_ssize_t n = 0; n < count; n++) {
            const double *u = ups + (Py_ssize_t)(places[n] / wide) * rank, *d = downs + (Py_ssize_t)(places[n] % wide) * rank;
            double s[8] = {0};
            if (n + 4 < count) {
                const double *soon = downs + (Py_ssize_t)(places[n + 4] % wide) * rank;
                for (Py_ssize_t k = 0; k < rank; k += 8)
                    __builtin_prefetch(soon + k);
            }
            for (Py_ssize_t k = 0; k < rank; k += 8)
                for (int lane = 0; lane < 8; lane++)
                    s[lane] += u[k + lane] * d[k + lane];
            double sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
            if (kind == 2) {
                float *place = (float *)stored.buf + places[n], before = *place, after = (float)((double)before + sum);
                if (before == before) {
                    changed += memcmp(&before, &after, sizeof before) != 0;
                    infinite += __builtin_isinf(after) && !__builtin_isinf(before);
                    *place = after;
                }
            } else {
                uint16_t *place = (uint16_t *)stored.buf + places[n], before = *place;
                double value = stored16(before, kind == 1);
                if (value == value) {
                    uint16_t after = rounded16(value + sum, kind == 1), top = kind == 1 ? 0x7C00u : 0x7F80u;
                    changed += before != after;
                    infinite += (after & 0x7FFFu) == top && (before & 0x7FFFu) != top;
                    *place = after;
                }
            }
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&stored);
    PyBuffer_Release(&flat);
    PyBuffer_Release(&up);
    PyBuffer_Release(&down);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "settle: a buffer is too small");
        return NULL;
    }
    return Py_BuildValue("ll", changed, infinite);
}

/* instruction_sets() -> ((name, lanes), ...), the best first. */
static PyObject *instruction_sets(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *found = PyTuple_New(set_count);
    for (int i = 0; found && i < set_count; i++)
        PyTuple_SET_ITEM(found, i, Py_BuildValue("si", sets[i].name, sets[i].lanes));
    return found;
}

static PyMethodDef methods[] = {
    {"merge_tile", merge_tile, METH_VARARGS, "Round W + up @ down into a tile in place; see tile.c."},
    {"settle", settle, METH_VARARGS, "Decide single elements of a tile in float64; see tile.c."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "The instruction sets this processor has a kernel for, best first."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tile", "Tile kernels for merging.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_tile(void)
{
    find_sets();
    PyObject *made = PyModule_Create(&definition);
    if (made && PyModule_AddIntConstant(made, "CHUNK", CHUNK) < 0)
        Py_CLEAR(made);
    return made;
}
