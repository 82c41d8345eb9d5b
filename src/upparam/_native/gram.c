/* upparam._native.gram: A A^T of the rows of one or two factors as they are stored, in float64 or, where that is enough, in float32; and how
 * the spaces of the rows of two lie to each other.
 *
 * The instruction set is chosen when the module is loaded. No state; the GIL is released while the products are summed.
 */

#include "native.h"
#include <math.h>
#include <stdlib.h>

#define DEPTH 192
#define INTERFACE 2 /* counts changes of what Python passes: a module built from older source is not used */
#define WIDEST 32 /* rows of a panel */
#define SQUARE 8

enum { BFLOAT, HALF, SINGLE, DOUBLE };

/* A factor: `rows` rows of `columns` elements of `size` bytes; `across`: stored column by column. */
typedef struct {
    const void *stored;
    long rows, columns, size;
    int kind, across;
} Part;

static inline float half_value(uint16_t code)
{
    uint32_t magnitude = (uint32_t)(code & 0x7FFFu) << 13, sign = (uint32_t)(code & 0x8000u) << 16, bits;
    float value;
    memcpy(&value, &magnitude, sizeof value);
    value *= 5.192296858534828e+33f; /* 2^112: moves the exponent, subnormals included */
    memcpy(&bits, &value, sizeof bits);
    if ((code & 0x7C00u) == 0x7C00u)
        bits = 0x7F800000u | magnitude;
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#define BAND 32 /* columns that triangular systems are solved for at a time */

/* Rows are padded to whole bands. */
static long padded(long rows, long others)
{
    return ((rows > others ? rows : others) + BAND - 1) / BAND * BAND;
}

/* The room, in doubles, that spaces_kernels.h works in. */
static long room(long rows, long others)
{
    long stride = padded(rows, others);
    return 5 * stride * stride + 4 * stride + stride * DEPTH;
}

#define PLAIN_FMA(a, b, c) ((a) * (b) + (c))

#define NAME(x) JOIN(x, portable_single)
#define TARGET
#define REAL float
#define LANES 4
#define ROWS 4
#define FMA PLAIN_FMA
#include "gram_kernels.h"
#define NAME(x) JOIN(x, portable_double)
#define REAL double
#define SPACES
#define LANES 2
#define ROWS 4
#define FMA PLAIN_FMA
#include "gram_kernels.h"
#undef TARGET

#ifdef X86
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(x) JOIN(x, avx2_single)
#define REAL float
#define LANES 8
#define ROWS 4
#define FMA(a, b, c) ((NAME(vector))_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define HALF_UP(from) ((NAME(vector))_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from))))
#include "gram_kernels.h"
#define NAME(x) JOIN(x, avx2_double)
#define REAL double
#define SPACES
#define LANES 4
#define ROWS 4
#define FMA(a, b, c) ((NAME(vector))_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define HALF_UP(from) ((NAME(vector))_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(from)))))
#include "gram_kernels.h"
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define NAME(x) JOIN(x, avx512_single)
#define REAL float
#define LANES 16
#define ROWS 8
#define FMA(a, b, c) ((NAME(vector))_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define HALF_UP(from) ((NAME(vector))_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from))))
#include "gram_kernels.h"
#define NAME(x) JOIN(x, avx512_double)
#define REAL double
#define SPACES
#define LANES 8
#define ROWS 8
#define FMA(a, b, c) ((NAME(vector))_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define HALF_UP(from) ((NAME(vector))_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from)))))
#include "gram_kernels.h"
#undef TARGET
#endif

typedef void (*gram_function)(double *, long, const Part *, int, void *);
typedef int (*spaces_function)(double *, const double *, long, long, double, double *);

typedef struct {
    const char *name;
    gram_function single, wide;
    spaces_function spaces;
} InstructionSet;

static InstructionSet sets[3];
static int set_count;

static void find_sets(void)
{
    set_count = 0;
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        sets[set_count++] = (InstructionSet){"avx512", gram_avx512_single, gram_avx512_double, spaces_avx512_double};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        sets[set_count++] = (InstructionSet){"avx2", gram_avx2_single, gram_avx2_double, spaces_avx2_double};
#endif
    sets[set_count++] = (InstructionSet){"portable", gram_portable_single, gram_portable_double, spaces_portable_double};
}

/* The upper triangle of `sums` as a full matrix, by small squares: lines of the lower triangle lie far apart. */
static void mirror(double *full, long count, const double *sums, long stride)
{
    for (long top = 0; top < count; top += SQUARE)
        for (long left = top; left < count; left += SQUARE)
            for (long row = top; row < top + SQUARE && row < count; row++)
                for (long column = left > row ? left : row; column < left + SQUARE && column < count; column++)
                    full[row * count + column] = full[column * count + row] = sums[row * stride + column];
}

/* gram(out, columns, parts, wide, set)
 *
 * `parts`: tuples (stored, rows, kind, across), one or two; kind: 0 bfloat16, 1 float16, 2 float32, 3 float64; across: stored as
 * (columns, rows). `out` (all rows, all rows) of doubles becomes the inner products of all rows, multiplied in double where `wide`. */
static PyObject *gram(PyObject *module, PyObject *args)
{
    (void)module;
    static const long sizes[] = {2, 2, 4, 8};
    Py_buffer out, buffers[2];
    Py_ssize_t columns, rows[2];
    PyObject *given, *answer = NULL;
    Part parts[2];
    int wide, set, held = 0;
    if (!PyArg_ParseTuple(args, "w*nO!pi", &out, &columns, &PyTuple_Type, &given, &wide, &set))
        return NULL;
    Py_ssize_t count = PyTuple_GET_SIZE(given);
    long total = 0;
    if (count < 1 || count > 2 || columns < 0 || set < 0 || set >= set_count) {
        PyErr_SetString(PyExc_ValueError, "gram: one or two parts, and an instruction set there is");
        goto done;
    }
    for (int part = 0; part < count; part++) {
        int kind, across;
        PyObject *item = PyTuple_GET_ITEM(given, part);
        if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "y*nip", buffers + part, rows + part, &kind, &across))
            goto done;
        held++;
        if (kind < BFLOAT || kind > DOUBLE || rows[part] < 0 || rows[part] > 1 << 20 || columns > (Py_ssize_t)1 << 40
            || buffers[part].len < rows[part] * columns * sizes[kind]) {
            PyErr_SetString(PyExc_ValueError, "gram: no such kind, or a buffer that is too small");
            goto done;
        }
        parts[part] = (Part){buffers[part].buf, (long)rows[part], (long)columns, sizes[kind], kind, across};
        total += (long)rows[part];
    }
    long stride = (total + WIDEST - 1) / WIDEST * WIDEST;
    if (out.len < (Py_ssize_t)total * total * 8) {
        PyErr_SetString(PyExc_ValueError, "gram: the result does not fit");
        goto done;
    }
    double *sums = calloc((size_t)stride * stride + 1, sizeof(double));
    void *space = malloc((size_t)stride * DEPTH * sizeof(double) + 1);
    if (sums && space) {
        Py_BEGIN_ALLOW_THREADS
        (wide ? sets[set].wide : sets[set].single)(sums, stride, parts, (int)count, space);
        mirror(out.buf, total, sums, stride);
        Py_END_ALLOW_THREADS
        answer = Py_NewRef(Py_None);
    } else
        PyErr_NoMemory();
    free(sums);
    free(space);
done:
    PyBuffer_Release(&out);
    while (held--)
        PyBuffer_Release(buffers + held);
    return answer;
}

/* spaces(products, rows, least, set) -> (smallest, largest, sum) or None
 *
 * Of the squared cosines of the principal angles between the space of the first `rows` rows and that of the rest, from the inner products
 * of all (doubles, a square matrix); None where the Cholesky diagonal of one, of unit rows, falls below `least` of its largest value. */
static PyObject *spaces(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer products;
    Py_ssize_t rows;
    double least, found[3];
    int set, told = 0;
    PyObject *answer = NULL;
    if (!PyArg_ParseTuple(args, "y*ndi", &products, &rows, &least, &set))
        return NULL;
    long total = (long)sqrt((double)(products.len / 8)), others = total - (long)rows;
    if ((Py_ssize_t)total * total * 8 != products.len || rows < 1 || others < 1 || total > 1 << 15 || set < 0 || set >= set_count)
        PyErr_SetString(PyExc_ValueError, "spaces: a square matrix of at least two rows, and an instruction set there is");
    else {
        double *space = malloc((size_t)room((long)rows, others) * sizeof(double));
        if (space) {
            Py_BEGIN_ALLOW_THREADS
            told = sets[set].spaces(found, products.buf, (long)rows, others, least, space);
            Py_END_ALLOW_THREADS
            answer = told ? Py_BuildValue("(ddd)", found[0], found[1], found[2]) : Py_NewRef(Py_None);
        } else
            PyErr_NoMemory();
        free(space);
    }
    PyBuffer_Release(&products);
    return answer;
}

/* instruction_sets() -> (name, ...), the best first. */
static PyObject *instruction_sets(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *found = PyTuple_New(set_count);
    for (int i = 0; found && i < set_count; i++)
        PyTuple_SET_ITEM(found, i, PyUnicode_FromString(sets[i].name));
    return found;
}

static PyMethodDef methods[] = {
    {"gram", gram, METH_VARARGS, "Inner products of the rows of stored factors; see gram.c."},
    {"spaces", spaces, METH_VARARGS, "How two spaces lie to each other; see gram.c."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "The instruction sets this processor has a kernel for, best first."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "gram", "Gram matrices of stored factors.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_gram(void)
{
    find_sets();
    PyObject *made = PyModule_Create(&definition);
    if (made && PyModule_AddIntConstant(made, "INTERFACE", INTERFACE) < 0)
        Py_CLEAR(made);
    return made;
}
