/* upparam._native.carry: bytes from files to a file, and bytes of files compared, many tensors at a call.
 *
 * The GIL is released meanwhile: threads that hand it to each other for every chunk are put on one core by the system.
 * What goes wrong with a tensor is told by a 0; Python does that tensor itself, and says what is wrong with it.
 *
 * Where the bytes of a tensor come from is its way, a tuple that begins with its kind:
 *   (0, ((descriptor, at, size), ...))            spans one after the other
 *   (1, rows, ((descriptor, at, width), ...))     spans of rows side by side: each row has `width` bytes of every span in turn
 *   (2, descriptor, at, rows, columns, item)      a stored matrix (rows, columns) of items of 1, 2, 4 or 8 bytes, turned to (columns, rows)
 *   (3, descriptor, at, stored, width, order)     of `stored` rows of `width` bytes those of the numbers in `order` (uint32), in its order
 */

#include "native.h"

#include <unistd.h>

#define INTERFACE 2 /* counts changes of what Python passes: a module built from older source is not used */

enum { FIRST = 1 << 12 }; /* bytes that are compared before the rest is read */
enum { LYING, BESIDE, TURNED, PICKED };

typedef struct {
    int from;
    off_t at;
    Py_ssize_t size; /* BESIDE: the bytes of a row */
} span;

typedef struct {
    int kind, item;
    Py_ssize_t count, rows, columns;
    Py_ssize_t size; /* of all bytes */
    Py_ssize_t step; /* only whole multiples of this are asked for, but for the end */
    Py_ssize_t held; /* bytes of memory that filling takes */
    span *spans;
    Py_buffer order;
} way;

static int filled(int descriptor, char *to, Py_ssize_t size, off_t at)
{
    while (size > 0) {
        ssize_t count = pread(descriptor, to, (size_t)size, at);
        if (count <= 0)
            return 0;
        to += count, at += count, size -= count;
    }
    return 1;
}

static int emptied(int descriptor, const char *from, Py_ssize_t size, off_t at)
{
    while (size > 0) {
        ssize_t count = pwrite(descriptor, from, (size_t)size, at);
        if (count <= 0)
            return 0;
        from += count, at += count, size -= count;
    }
    return 1;
}

/* ---- a matrix turned: `to` gets rows [start, stop) of the turned one */

enum { BLOCK = 32 }; /* items of a block's side: whole lines of the cache are read and written */

#ifdef __SSE2__
static void turned_eight(const uint16_t *from, Py_ssize_t pitch, uint16_t *to, Py_ssize_t other)
{
    __m128i a[8], b[8];
    for (int i = 0; i < 8; i++)
        a[i] = _mm_loadu_si128((const __m128i *)(from + i * pitch));
    for (int i = 0; i < 4; i++)
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]), b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    for (int i = 0; i < 4; i++)
        a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]), a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    for (int i = 0; i < 4; i++)
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]), b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    for (int i = 0; i < 8; i++)
        _mm_storeu_si128((__m128i *)(to + i * other), b[i]);
}
#endif

#define TURN(name, type, eights)                                                                                              \
    static void name(const type *from, Py_ssize_t rows, Py_ssize_t columns, type *to, Py_ssize_t start, Py_ssize_t stop)      \
    {                                                                                                                         \
        for (Py_ssize_t i = 0; i < rows; i += BLOCK)                                                                          \
            for (Py_ssize_t j = start; j < stop; j += BLOCK) {                                                                \
                Py_ssize_t low = rows - i < BLOCK ? rows - i : BLOCK, wide = stop - j < BLOCK ? stop - j : BLOCK;             \
                const type *one = from + i * columns + j;                                                                     \
                type *other = to + (j - start) * rows + i;                                                                    \
                if (low == BLOCK && wide == BLOCK && eights(one, columns, other, rows))                                       \
                    continue;                                                                                                 \
                for (Py_ssize_t x = 0; x < wide; x++)                                                                         \
                    for (Py_ssize_t y = 0; y < low; y++)                                                                      \
                        other[x * rows + y] = one[y * columns + x];                                                           \
            }                                                                                                                 \
    }

static int by_eight(const uint16_t *from, Py_ssize_t pitch, uint16_t *to, Py_ssize_t other)
{
#ifdef __SSE2__
    for (int i = 0; i < BLOCK; i += 8)
        for (int j = 0; j < BLOCK; j += 8)
            turned_eight(from + i * pitch + j, pitch, to + j * other + i, other);
    return 1;
#else
    return 0;
#endif
}

#define ONE_BY_ONE(from, pitch, to, other) 0
TURN(turned_1, uint8_t, ONE_BY_ONE)
TURN(turned_2, uint16_t, by_eight)
TURN(turned_4, uint32_t, ONE_BY_ONE)
TURN(turned_8, uint64_t, ONE_BY_ONE)

static void turned(const way *one, const char *from, char *to, Py_ssize_t start, Py_ssize_t stop)
{
    if (one->item == 1)
        turned_1((const uint8_t *)from, one->rows, one->columns, (uint8_t *)to, start, stop);
    else if (one->item == 2)
        turned_2((const uint16_t *)from, one->rows, one->columns, (uint16_t *)to, start, stop);
    else if (one->item == 4)
        turned_4((const uint32_t *)from, one->rows, one->columns, (uint32_t *)to, start, stop);
    else
        turned_8((const uint64_t *)from, one->rows, one->columns, (uint64_t *)to, start, stop);
}

/* ---- bytes of a way */

/* Rows of `width` bytes to places `pitch` apart; the sizes of usual ranks without a call for each. */
static void strewn(const char *from, Py_ssize_t width, char *to, Py_ssize_t pitch, Py_ssize_t rows)
{
#define ROWS(size)                                                \
    for (Py_ssize_t row = 0; row < rows; row++)                   \
        memcpy(to + row * pitch, from + row * (size), (size_t)(size))
    switch (width) {
    case 8: ROWS(8); break;
    case 16: ROWS(16); break;
    case 32: ROWS(32); break;
    case 64: ROWS(64); break;
    default: ROWS(width);
    }
#undef ROWS
}

/* Bytes [start, start + size) to `to`; `held` is this way's own memory, whose content stays from one call to the next of a tensor. */
static int fill(const way *one, Py_ssize_t start, Py_ssize_t size, char *to, char *held)
{
    const span *spans = one->spans;
    if (one->kind == LYING) {
        for (Py_ssize_t at = 0, number = 0; number < one->count && size > 0; at += spans[number++].size) {
            Py_ssize_t skipped = start - at, part = spans[number].size - skipped;
            if (part <= 0)
                continue;
            part = part < size ? part : size;
            if (!filled(spans[number].from, to, part, spans[number].at + skipped))
                return 0;
            start += part, to += part, size -= part;
        }
        return size == 0;
    }
    Py_ssize_t row = start / one->step, rows = size / one->step;
    if (one->kind == BESIDE) {
        for (Py_ssize_t number = 0; number < one->count; to += spans[number++].size) {
            Py_ssize_t width = spans[number].size;
            if (!filled(spans[number].from, held, rows * width, spans[number].at + row * width))
                return 0;
            strewn(held, width, to, one->step, rows);
        }
        return 1;
    }
    if (start == 0 && !filled(spans->from, held, spans->size, spans->at))
        return 0;
    if (one->kind == TURNED) {
        turned(one, held, to, row, row + rows);
        return 1;
    }
    const uint32_t *order = one->order.buf;
    for (Py_ssize_t at = row; at < row + rows; at++, to += one->step)
        memcpy(to, held + (Py_ssize_t)order[at] * one->step, (size_t)one->step);
    return 1;
}

/* Bytes to take at a time where `room` are there: whole steps. */
static Py_ssize_t piece(Py_ssize_t room, Py_ssize_t step)
{
    return room - room % step;
}

static int copied(const way *one, int descriptor, off_t at, char *buffer, Py_ssize_t room)
{
    Py_ssize_t most = piece(room, one->step);
    for (Py_ssize_t done = 0, size; done < one->size; done += size) {
        size = one->size - done < most ? one->size - done : most;
        if (!fill(one, done, size, buffer, buffer + room) || !emptied(descriptor, buffer, size, at + done))
            return 0;
    }
    return 1;
}

static int equal(const way *one, const way *other, char *buffer, Py_ssize_t room)
{
    char *second = buffer + room / 2, *held = buffer + room;
    Py_ssize_t step = one->step > other->step ? one->step : other->step, most = piece(room / 2, step);
    if (one->size != other->size || step % one->step || step % other->step)
        return 0;
    for (Py_ssize_t done = 0, size; done < one->size; done += size) {
        size = done || most < FIRST ? most : piece(FIRST + step - 1, step);
        if (size > most)
            size = most;
        if (size > one->size - done)
            size = one->size - done;
        if (!fill(one, done, size, buffer, held) || !fill(other, done, size, second, held + one->held) || memcmp(buffer, second, (size_t)size))
            return 0;
    }
    return 1;
}

/* ---- what Python passes */

static int laid(PyObject *given, way *one)
{
    PyObject *spans = PySequence_Fast(given, "carry: expected a sequence of spans");
    if (!spans)
        return 0;
    one->count = PySequence_Fast_GET_SIZE(spans);
    if (!(one->spans = PyMem_New(span, one->count ? one->count : 1)))
        PyErr_NoMemory();
    for (Py_ssize_t at = 0; at < one->count && !PyErr_Occurred(); at++) {
        long long from;
        PyObject *item = PySequence_Fast_GET_ITEM(spans, at);
        if (!PyTuple_Check(item))
            PyErr_SetString(PyExc_TypeError, "carry: a span is a tuple");
        else if (PyArg_ParseTuple(item, "iLn", &one->spans[at].from, &from, &one->spans[at].size)) {
            one->spans[at].at = (off_t)from;
            one->size += one->spans[at].size;
            if (one->spans[at].size < 0 || one->size > PY_SSIZE_T_MAX / 4)
                PyErr_SetString(PyExc_ValueError, "carry: a span of no possible size");
        }
    }
    Py_DECREF(spans);
    return !PyErr_Occurred();
}

/* One span, and how many bytes all items are; an error where no file can hold them. */
static int placed(way *one, int from, long long at, Py_ssize_t rows, Py_ssize_t width, Py_ssize_t wanted)
{
    if (rows < 0 || width <= 0 || wanted < 0 || rows > PY_SSIZE_T_MAX / 4 / width || wanted > PY_SSIZE_T_MAX / 4 / width)
        return PyErr_SetString(PyExc_ValueError, "carry: a matrix of no possible size"), 0;
    if (!(one->spans = PyMem_New(span, 1)))
        return PyErr_NoMemory(), 0;
    one->held = (rows * width + 63) / 64 * 64, one->size = wanted * width;
    *one->spans = (span){from, (off_t)at, rows * width};
    return 1;
}

static int taken(PyObject *given, way *one, Py_ssize_t room)
{
    PyObject *spans, *order;
    int from, kind = PyTuple_Check(given) && PyTuple_GET_SIZE(given) ? (int)PyLong_AsLong(PyTuple_GET_ITEM(given, 0)) : -1;
    long long at;
    Py_ssize_t width = 0;
    *one = (way){.kind = kind, .step = 1};
    if (PyErr_Occurred())
        return 0;
    if (kind == LYING)
        return PyArg_ParseTuple(given, "iO", &kind, &spans) && laid(spans, one);
    if (kind == BESIDE) {
        if (!PyArg_ParseTuple(given, "inO", &kind, &one->rows, &spans) || !laid(spans, one))
            return 0;
        width = one->size, one->held = room;
        if (one->rows < 0 || width <= 0 || one->rows > PY_SSIZE_T_MAX / 4 / width)
            return PyErr_SetString(PyExc_ValueError, "carry: rows of no possible size"), 0;
        one->size *= one->rows;
    } else if (kind == TURNED) {
        if (!PyArg_ParseTuple(given, "iiLnni", &kind, &from, &at, &one->rows, &one->columns, &one->item))
            return 0;
        if ((one->item != 1 && one->item != 2 && one->item != 4 && one->item != 8) || one->rows <= 0 || one->rows > PY_SSIZE_T_MAX / 4 / one->item)
            return PyErr_SetString(PyExc_ValueError, "carry: a matrix that cannot be turned"), 0;
        width = one->rows * one->item;
        if (!placed(one, from, at, one->columns, width, one->columns))
            return 0;
    } else if (kind == PICKED) {
        Py_ssize_t stored;
        if (!PyArg_ParseTuple(given, "iiLnnO", &kind, &from, &at, &stored, &width, &order) || PyObject_GetBuffer(order, &one->order, PyBUF_SIMPLE) < 0)
            return 0;
        Py_ssize_t count = one->order.len / (Py_ssize_t)sizeof(uint32_t);
        if (!placed(one, from, at, stored, width, count))
            return 0;
        for (Py_ssize_t row = 0; row < count; row++)
            if (((const uint32_t *)one->order.buf)[row] >= stored)
                return PyErr_SetString(PyExc_ValueError, "carry: no such row"), 0;
    } else
        return PyErr_SetString(PyExc_TypeError, "carry: no such way"), 0;
    one->step = width;
    if (width > room / 2)
        return PyErr_SetString(PyExc_ValueError, "carry: a row is wider than the buffer"), 0;
    return 1;
}

static void freed(way *one)
{
    PyMem_Free(one->spans);
    if (one->order.obj)
        PyBuffer_Release(&one->order);
}

typedef struct {
    way one, other;
    int to;
    off_t at;
} job;

/* A byte for each job: 1 where it was done to its end. `compared`: the jobs are (way, way), else (way, descriptor, offset). */
static PyObject *each(PyObject *args, int compared)
{
    PyObject *given, *jobs = NULL, *result = NULL;
    Py_buffer buffer;
    Py_ssize_t room, count = 0;
    if (!PyArg_ParseTuple(args, "Ow*n", &given, &buffer, &room))
        return NULL;
    job *all = NULL;
    if (room < 2 || room > buffer.len)
        PyErr_SetString(PyExc_ValueError, "carry: the buffer is too small");
    else if ((jobs = PySequence_Fast(given, "carry: expected a sequence of jobs"))) {
        count = PySequence_Fast_GET_SIZE(jobs);
        if (!(all = PyMem_Calloc((size_t)(count ? count : 1), sizeof(job))))
            PyErr_NoMemory();
        for (Py_ssize_t at = 0; at < count && !PyErr_Occurred(); at++) {
            PyObject *item = PySequence_Fast_GET_ITEM(jobs, at), *one, *other;
            long long place = 0;
            if (!PyTuple_Check(item))
                PyErr_SetString(PyExc_TypeError, "carry: a job is a tuple");
            else if (compared ? PyArg_ParseTuple(item, "OO", &one, &other) : PyArg_ParseTuple(item, "OiL", &one, &all[at].to, &place)) {
                all[at].at = (off_t)place;
                if (taken(one, &all[at].one, room) && (!compared || taken(other, &all[at].other, room))
                    && all[at].one.held + all[at].other.held > buffer.len - room)
                    PyErr_SetString(PyExc_ValueError, "carry: the buffer is too small");
            }
        }
        if (!PyErr_Occurred() && (result = PyBytes_FromStringAndSize(NULL, count))) {
            char *found = PyBytes_AS_STRING(result);
            Py_BEGIN_ALLOW_THREADS
            for (Py_ssize_t at = 0; at < count; at++)
                found[at] = (char)(compared ? equal(&all[at].one, &all[at].other, buffer.buf, room)
                                            : copied(&all[at].one, all[at].to, all[at].at, buffer.buf, room));
            Py_END_ALLOW_THREADS
        }
    }
    for (Py_ssize_t at = 0; all && at < count; at++)
        freed(&all[at].one), freed(&all[at].other);
    PyMem_Free(all);
    Py_XDECREF(jobs);
    PyBuffer_Release(&buffer);
    return result;
}

/* copy([(way, descriptor, offset), ...], buffer, room) -> bytes, 1 for each that was copied whole; `room` of the buffer are for pieces,
 * behind them lies what turning, picking and putting side by side hold */
static PyObject *copy(PyObject *module, PyObject *args)
{
    (void)module;
    return each(args, 0);
}

/* same([(way, way), ...], buffer, room) -> bytes, 1 for each pair that was read whole on both sides and agrees */
static PyObject *same(PyObject *module, PyObject *args)
{
    (void)module;
    return each(args, 1);
}

static PyMethodDef methods[] = {
    {"copy", copy, METH_VARARGS, "Tensors from files to a file; see carry.c."},
    {"same", same, METH_VARARGS, "Tensors of files compared; see carry.c."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "carry", "Bytes from file to file.", 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_carry(void)
{
    PyObject *made = PyModule_Create(&definition);
    if (made && PyModule_AddIntConstant(made, "INTERFACE", INTERFACE) < 0)
        Py_CLEAR(made);
    return made;
}
