/* upparam._native.tile: one tile of a stored weight becomes round(W + up @ down) in place, for weights of 8 or 16 bits and of float32.
 *
 * Every element whose rounding float32 (for float32 weights: float64) sums cannot decide is summed again in float64, in a fixed order.
 * So results do not depend on the instruction set, and equal those of the numpy path byte for byte.
 * The instruction set is chosen when the module is loaded. No state; the GIL is released while a tile is worked on.
 */

#include "native.h"
#include "tile_formats.h"

#define CHUNK 16
#define ROWS 4 /* of a block: its sums leave registers to what rounds the block before */
#define INTERFACE 6 /* counts changes of what Python passes: a module built from older source is not used */
#define WIDEST 32 /* columns of a panel */
#define EIGHTS(rank) (((rank) + 7) / 8 * 8)
#define GROUP_BYTES (16 << 10)
#define GROUP(bytes, rank) (GROUP_BYTES / ((long)(bytes) * ((rank) ? (rank) : 1)) > 1 ? GROUP_BYTES / ((long)(bytes) * ((rank) ? (rank) : 1)) : 1)
#define TINY 2e-37f

/* One tile: `stored` (rows, columns) of weights of its kind, or where to put them when they are `given` in float32, all finite, `up` (rows, rank), `panels` (see tile_layout.h) and `downs`, which is down as
 * (columns, rank), in float (float32 weights: double); the ranks of up and downs are padded with zeros to a multiple of 8. Where float does not
 * hold the values, `up64`, else NULL, and `downs` have them in double. A sum over row i and a panel p is within row_bound[i] * panel_norm[p] of
 * the true one (float32 weights: that times 2^-28). */
typedef struct {
    void *stored;
    long rows, columns, rank;
    const void *up, *panels;
    const double *up64;
    const void *downs;
    const float *row_bound, *panel_norm;
    int kind, wide_downs;
    const float *given;
} Tile;

/* Eight numbers of a row, whatever the instruction set; and the order in which their sums are added up, which numpy's path uses too. */
typedef double Eight __attribute__((vector_size(64)));
typedef float EightFloats __attribute__((vector_size(32)));
typedef int64_t Mask __attribute__((vector_size(64)));
#define SUM(s) ((((s)[0] + (s)[4]) + ((s)[2] + (s)[6])) + (((s)[1] + (s)[5]) + ((s)[3] + (s)[7])))

/* One factor to be laid out: see tile_layout.h. */
typedef struct {
    const void *from;
    void *to, *downs;
    long rows, columns, rank, at;
    int wide, wide_to, split;
    double factor;
    const double *weights;
    double *squares;
} Layout;

/* Elements of a tile whose sums are still to be taken in float64: those of a row from `column` on that are marked. */
typedef struct {
    int32_t row, column;
    uint32_t mark;
} Doubt;

#define DOUBTS 512

typedef struct {
    long count;
    Doubt at[DOUBTS];
} Doubts;

/* Add `sum` to element `at`. NaN in the weight stays as it is. */
static inline __attribute__((always_inline)) void add_and_round(const Tile *tile, int kind, long at, double sum, long *changed, long *infinite)
{
    if (kind == SINGLE) {
        float *place = (float *)tile->stored + at, before = *place, after = (float)((double)before + sum);
        if (before != before)
            return;
        *changed += memcmp(&before, &after, sizeof before) != 0;
        *infinite += __builtin_isinf(after) && !__builtin_isinf(before);
        *place = after;
        return;
    }
    const int eight = EIGHT(kind);
    uint8_t *const small = (uint8_t *)tile->stored + at;
    uint16_t *const place = (uint16_t *)tile->stored + at;
    const uint16_t before = eight ? *small : *place;
    const double value = tile->given ? (double)tile->given[at] : as_stored(before, kind);
    if (value != value)
        return;
    const uint16_t after = rounded(value + sum, kind), top = kind == BFLOAT ? 0x7F80u : LAST(kind), sized = SIGN(kind) - 1u;
    *changed += before != after;
    if (kind == E4M3)
        *infinite += __builtin_fabs(value + sum) > 448.0;
    else
        *infinite += (after & sized) == top && (tile->given || (before & sized) != top);
    if (eight)
        *small = (uint8_t)after;
    else
        *place = after;
}

#define LANES 4
#define NAME(x) JOIN(x, portable)
#define TARGET
#define FMA(a, b, c) ((a) * (b) + (c))
#define FMAD(a, b, c) ((a) * (b) + (c))
#include "tile_layout.h"
#include "tile_rows.h"
#include "tile_kernels.h"
#undef LANES
#undef NAME
#undef TARGET
#undef FMA
#undef FMAD
#undef LANE_BITS
#undef NARROW
#undef COUNT
#undef ANY
#undef MARKS

#ifdef X86
#define LANES 8
#define NAME(x) JOIN(x, avx2)
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define FMA(a, b, c) ((VF)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FMAD(a, b, c) ((VD)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define LANE_BITS(mask) ((uint32_t)_mm256_movemask_ps((__m256)(mask)))
#define NARROW(codes) __builtin_convertvector(codes, VH)
#define COUNT(mask) (__builtin_popcount((unsigned)_mm256_movemask_epi8((__m256i)(mask))) / 2)
#define ANY(mask) (!_mm256_testz_si256((__m256i)(mask), (__m256i)(mask)))
#define MARKS(mask) ((uint32_t)_mm_movemask_epi8(_mm_packs_epi16(_mm256_castsi256_si128((__m256i)(mask)), _mm256_extracti128_si256((__m256i)(mask), 1))))
#define HALF_UP(code) ((VF)_mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128((__m256i)(code)), _mm256_extracti128_si256((__m256i)(code), 1))))
#define HALF_DOWN(a) ((VU)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)(a), _MM_FROUND_TO_NEAREST_INT)))
#include "tile_layout.h"
#include "tile_rows.h"
#include "tile_kernels.h"
#undef LANES
#undef NAME
#undef TARGET
#undef FMA
#undef FMAD
#undef LANE_BITS
#undef NARROW
#undef COUNT
#undef ANY
#undef MARKS
#undef HALF_UP
#undef HALF_DOWN

#define LANES 16
#define NAME(x) JOIN(x, avx512)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

/* `bfloat_row` of tile_rows.h with masks. */
TARGET static inline __attribute__((always_inline)) uint32_t bfloat_row_avx512(uint16_t *w, __m512 sum0, __m512 sum1, float reach, int exact, long *changed)
{
    const __m512i upper = _mm512_set1_epi32((int)0xFFFF0000u), sign = _mm512_set1_epi32((int)0x80000000u);
    __m512i old = _mm512_loadu_si512(w), code;
    __m512 v0 = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(old, 16)), sum0);
    __m512 v1 = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(old, upper)), sum1);
    __mmask32 doubt = 0;
    if (exact) {
        const __m512i bits = _mm512_castps_si512(_mm512_set1_ps(reach)), out = _mm512_set1_epi32(0x8004), in = _mm512_set1_epi32(0x7FFC);
        __m512 s0 = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v0), sign, bits, 0xEA)); /* (a & b) | c */
        __m512 s1 = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v1), sign, bits, 0xEA));
        __m512i far0 = _mm512_add_epi32(_mm512_castps_si512(_mm512_add_ps(v0, s0)), out), far1 = _mm512_add_epi32(_mm512_castps_si512(_mm512_add_ps(v1, s1)), out);
        __m512i near0 = _mm512_add_epi32(_mm512_castps_si512(_mm512_sub_ps(v0, s0)), in), near1 = _mm512_add_epi32(_mm512_castps_si512(_mm512_sub_ps(v1, s1)), in);
        code = _mm512_ternarylogic_epi32(far1, upper, _mm512_srli_epi32(far0, 16), 0xEA);
        doubt = _mm512_cmpneq_epi16_mask(code, _mm512_ternarylogic_epi32(near1, upper, _mm512_srli_epi32(near0, 16), 0xEA));
    } else {
        const __m512i half = _mm512_set1_epi32(0x7FFF), one = _mm512_set1_epi32(1);
        __m512i b0 = _mm512_castps_si512(v0), b1 = _mm512_castps_si512(v1);
        b0 = _mm512_add_epi32(_mm512_add_epi32(b0, half), _mm512_and_si512(_mm512_srli_epi32(b0, 16), one));
        b1 = _mm512_add_epi32(_mm512_add_epi32(b1, half), _mm512_and_si512(_mm512_srli_epi32(b1, 16), one));
        code = _mm512_ternarylogic_epi32(b1, upper, _mm512_srli_epi32(b0, 16), 0xEA);
    }
    doubt |= _mm512_cmpge_epu16_mask(_mm512_slli_epi16(code, 1), _mm512_set1_epi16((short)(2 * 0x7F7C)));
    code = _mm512_mask_mov_epi16(code, doubt, old);
    *changed += __builtin_popcount(_mm512_cmpneq_epi16_mask(code, old));
    _mm512_storeu_si512(w, code);
    return doubt;
}

/* `narrow_row` of tile_rows.h for float16, with masks; the ends keep their signs. */
TARGET static inline __attribute__((always_inline)) uint32_t half_row_avx512(uint16_t *w, __m512 sum0, __m512 sum1, float reach, int exact, long *changed)
{
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512i sign = _mm512_set1_epi32((int)0x80000000u);
    __m512i old = _mm512_loadu_si512(w), code;
    __m512 v0 = _mm512_add_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(old)), sum0);
    __m512 v1 = _mm512_add_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(old, 1)), sum1);
    __mmask32 doubt = 0;
    if (exact) {
        const __m512i bits = _mm512_castps_si512(_mm512_set1_ps(reach)), four = _mm512_set1_epi32(4);
        __m512 s0 = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v0), sign, bits, 0xEA));
        __m512 s1 = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v1), sign, bits, 0xEA));
        __m512 near0 = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(_mm512_sub_ps(v0, s0)), four));
        __m512 near1 = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(_mm512_sub_ps(v1, s1)), four));
        __m512i near = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(near0, nearest)), _mm512_cvtps_ph(near1, nearest), 1);
        v0 = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(_mm512_add_ps(v0, s0)), four));
        v1 = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(_mm512_add_ps(v1, s1)), four));
        code = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(v0, nearest)), _mm512_cvtps_ph(v1, nearest), 1);
        doubt = _mm512_cmpneq_epi16_mask(near, code);
    } else
        code = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(v0, nearest)), _mm512_cvtps_ph(v1, nearest), 1);
    doubt |= _mm512_cmpge_epu16_mask(_mm512_slli_epi16(code, 1), _mm512_set1_epi16((short)(2 * 0x7BFE)));
    code = _mm512_mask_mov_epi16(code, doubt, old);
    *changed += __builtin_popcount(_mm512_cmpneq_epi16_mask(code, old));
    _mm512_storeu_si512(w, code);
    return doubt;
}
#define ROW_OF_BFLOAT(w, sum, reach, exact, changed) bfloat_row_avx512(w, (__m512)(sum)[0], (__m512)(sum)[1], reach, exact, changed)
#define ROW_OF_HALF(w, sum, reach, exact, changed) half_row_avx512(w, (__m512)(sum)[0], (__m512)(sum)[1], reach, exact, changed)
#define FMA(a, b, c) ((VF)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FMAD(a, b, c) ((VD)_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define LANE_BITS(mask) ((uint32_t)_mm512_movepi32_mask((__m512i)(mask)))
#define NARROW(codes) ((VH)_mm512_cvtepi32_epi16((__m512i)(codes)))
#define COUNT(mask) __builtin_popcount(_mm512_movepi16_mask((__m512i)(mask)))
#define HALF_UP(code) ((VF)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(code))))
#define HALF_DOWN(a) ((VU)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)))
#include "tile_layout.h"
#include "tile_rows.h"
#include "tile_kernels.h"
#undef HALF_UP
#undef HALF_DOWN
#endif

typedef void (*tile_function)(const Tile *, int, long *, long *);
typedef int (*layout_function)(const Layout *);

typedef struct {
    const char *name;
    int lanes;
    tile_function narrow, single;
    layout_function lay_up, lay_down;
} InstructionSet;

static InstructionSet sets[3];
static int set_count;

static void find_sets(void)
{
    set_count = 0;
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets[set_count++] = (InstructionSet){"avx512", 16, tile_narrow_avx512, tile_single_avx512, lay_up_avx512, lay_down_avx512};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        sets[set_count++] = (InstructionSet){"avx2", 8, tile_narrow_avx2, tile_single_avx2, lay_up_avx2, lay_down_avx2};
#endif
    sets[set_count++] = (InstructionSet){"portable", 4, tile_narrow_portable, tile_single_portable, lay_up_portable, lay_down_portable};
}

/* merge_tile(stored, rows, columns, up, up64, panels, downs, rank, row_bound, panel_norm, kind, exact, set, given) -> (changed, infinite)
 *
 * The fields of Tile, None for NULL; kind: 0 bfloat16, 1 float16, 2 float32, 3 float8_e4m3fn, 4 float8_e5m2. `given`: the weights
 * in float32 where they become the kind (a narrow one, whose panels are not split) only now, else None. Buffers are checked for size. The answer is how many elements
 * changed and how many became infinite. */
static PyObject *merge_tile(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer stored, up, up64, panels, downs, bounds, norms, given;
    Py_ssize_t rows, columns, rank;
    int kind, exact, set;
    PyObject *answer = NULL;
    if (!PyArg_ParseTuple(args, "w*nny*z*y*y*ny*y*ipiz*", &stored, &rows, &columns, &up, &up64, &panels, &downs, &rank, &bounds, &norms, &kind, &exact, &set, &given))
        return NULL;
    if (set < 0 || set >= set_count || kind < BFLOAT || kind > E5M2 || rows < 0 || columns < 0 || rank < 0) {
        PyErr_SetString(PyExc_ValueError, "merge_tile: no such kind or instruction set");
        goto done;
    }
    Py_ssize_t element = kind == SINGLE ? 4 : kind > SINGLE ? 1 : 2, factor = kind == SINGLE ? 8 : 4, width = (kind == SINGLE ? 1 : 2) * sets[set].lanes;
    Py_ssize_t count = (columns + width - 1) / width;
    if (stored.len < rows * columns * element || up.len < rows * EIGHTS(rank) * factor || (up64.buf && up64.len < rows * EIGHTS(rank) * 8)
        || panels.len < count * width * rank * factor || downs.len < columns * EIGHTS(rank) * (downs.itemsize == 8 ? 8 : factor) || bounds.len < rows * 4
        || norms.len < count * 4 || (given.buf && (given.len < rows * columns * 4 || kind == SINGLE))) {
        PyErr_SetString(PyExc_ValueError, "merge_tile: a buffer is too small");
        goto done;
    }
    Tile tile = {stored.buf, rows, columns, rank, up.buf, panels.buf, up64.buf, downs.buf, bounds.buf, norms.buf, kind, downs.itemsize == 8, given.buf};
    long changed = 0, infinite = 0;
    Py_BEGIN_ALLOW_THREADS
    (kind == SINGLE ? sets[set].single : sets[set].narrow)(&tile, exact, &changed, &infinite);
    Py_END_ALLOW_THREADS
    answer = Py_BuildValue("ll", changed, infinite);
done:
    PyBuffer_Release(&stored);
    PyBuffer_Release(&up);
    PyBuffer_Release(&up64);
    PyBuffer_Release(&panels);
    PyBuffer_Release(&downs);
    PyBuffer_Release(&bounds);
    PyBuffer_Release(&norms);
    PyBuffer_Release(&given);
    return answer;
}

/* lay_up(up, rows, columns, factor, out, rank, at, kind, weights, squares, set) -> bool
 * lay_down(down, rows, columns, factor, panels, rank, at, kind, weights, squares, set, downs) -> bool
 *
 * The fields of Layout for the kernel of that kind; the factor of lay_down is 1. What they are given is of floats or doubles, as its items say. */
static PyObject *lay(PyObject *args, int down)
{
    Py_buffer from, to, weights, squares, downs = {0};
    Layout layout = {0};
    Py_ssize_t rows, columns, rank, at;
    int kind, set, held = 0;
    if (!PyArg_ParseTuple(args, down ? "y*nndw*nniy*w*iw*" : "y*nndw*nniy*w*i", &from, &rows, &columns, &layout.factor, &to, &rank, &at, &kind, &weights, &squares, &set, &downs))
        return NULL;
    int fits = set >= 0 && set < set_count && kind >= BFLOAT && kind <= E5M2 && rows >= 0 && columns >= 0 && at >= 0 && rank >= 0;
    if (fits) {
        Py_ssize_t width = (kind == SINGLE ? 1 : 2) * sets[set].lanes, ranks = down ? rows : columns, lines = down ? columns : rows;
        Py_ssize_t padded = down ? (columns + width - 1) / width * width : rows;
        layout.wide = from.itemsize == 8;
        layout.wide_to = kind == SINGLE;
        layout.split = kind == BFLOAT;
        fits = at + ranks <= rank && from.len >= rows * columns * (layout.wide ? 8 : 4)
               && to.len >= padded * (down ? rank : EIGHTS(rank)) * (layout.wide_to ? 8 : 4)
               && (!down || downs.len >= columns * EIGHTS(rank) * (layout.wide_to ? 8 : 4)) && weights.len >= rank * 8 && squares.len >= 2 * lines * 8;
    }
    if (fits) {
        layout.from = from.buf, layout.to = to.buf, layout.weights = weights.buf, layout.squares = squares.buf, layout.downs = downs.buf;
        layout.rows = rows, layout.columns = columns, layout.rank = rank, layout.at = at;
        Py_BEGIN_ALLOW_THREADS
        held = (down ? sets[set].lay_down : sets[set].lay_up)(&layout);
        Py_END_ALLOW_THREADS
    } else
        PyErr_SetString(PyExc_ValueError, "a buffer is too small, or there is no such kind or instruction set");
    PyBuffer_Release(&from);
    PyBuffer_Release(&to);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&squares);
    if (down)
        PyBuffer_Release(&downs);
    return fits ? PyBool_FromLong(held) : NULL;
}

static PyObject *lay_up(PyObject *module, PyObject *args)
{
    (void)module;
    return lay(args, 0);
}

static PyObject *lay_down(PyObject *module, PyObject *args)
{
    (void)module;
    return lay(args, 1);
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
    {"lay_up", lay_up, METH_VARARGS, "Lay a part of `up` out for merge_tile; see tile.c."},
    {"lay_down", lay_down, METH_VARARGS, "Lay a part of `down` out in panels and by columns; see tile.c."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "The instruction sets this processor has a kernel for, best first."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tile", "Tile kernels for merging.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_tile(void)
{
    find_sets();
    PyObject *made = PyModule_Create(&definition);
    if (made && (PyModule_AddIntConstant(made, "CHUNK", CHUNK) < 0 || PyModule_AddIntConstant(made, "INTERFACE", INTERFACE) < 0))
        Py_CLEAR(made);
    return made;
}
