/* upparam._native.carry: bytes from file to file, and bytes of files compared, many spans at a call.
 *
 * The GIL is released meanwhile: threads that hand it to each other for every chunk are put on one core by the system.
 * What goes wrong with a span is told by a 0; Python does that span itself, and says what is wrong with it.
 */

#include "native.h"

#include <unistd.h>

#define INTERFACE 1 /* counts changes of what Python passes: a module built from older source is not used */

enum { FIRST = 1 << 12 }; /* bytes that are compared before the rest is read */

typedef struct {
    int from, to;
    off_t at, other;
    Py_ssize_t size;
} span;

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

static int copied(const span *one, char *buffer, Py_ssize_t room)
{
    for (Py_ssize_t done = 0, size; done < one->size; done += size) {
        size = one->size - done < room ? one->size - done : room;
        if (!filled(one->from, buffer, size, one->at + done) || !emptied(one->to, buffer, size, one->other + done))
            return 0;
    }
    return 1;
}

static int equal(const span *one, char *buffer, Py_ssize_t room)
{
    char *second = buffer + room / 2;
    for (Py_ssize_t done = 0, size; done < one->size; done += size) {
        size = done ? room / 2 : FIRST < room / 2 ? FIRST : room / 2;
        if (size > one->size - done)
            size = one->size - done;
        if (!filled(one->from, buffer, size, one->at + done) || !filled(one->to, second, size, one->other + done)
            || memcmp(buffer, second, (size_t)size))
            return 0;
    }
    return 1;
}

/* A byte for each span: 1 where `work` was done to its end. */
static PyObject *each(PyObject *args, int (*work)(const span *, char *, Py_ssize_t))
{
    PyObject *given, *spans = NULL, *result = NULL;
    Py_buffer buffer;
    if (!PyArg_ParseTuple(args, "Ow*", &given, &buffer))
        return NULL;
    span *all = NULL;
    if (buffer.len < 2)
        PyErr_SetString(PyExc_ValueError, "carry: the buffer is too small");
    else if ((spans = PySequence_Fast(given, "carry: expected a sequence of spans"))) {
        Py_ssize_t count = PySequence_Fast_GET_SIZE(spans);
        if (!(all = PyMem_New(span, count ? count : 1)))
            PyErr_NoMemory();
        for (Py_ssize_t at = 0; at < count && !PyErr_Occurred(); at++) {
            long long from, to;
            PyObject *item = PySequence_Fast_GET_ITEM(spans, at);
            if (!PyTuple_Check(item))
                PyErr_SetString(PyExc_TypeError, "carry: a span is a tuple");
            else if (PyArg_ParseTuple(item, "iLiLn", &all[at].from, &from, &all[at].to, &to, &all[at].size))
                all[at].at = (off_t)from, all[at].other = (off_t)to;
        }
        if (!PyErr_Occurred() && (result = PyBytes_FromStringAndSize(NULL, count))) {
            char *found = PyBytes_AS_STRING(result);
            Py_BEGIN_ALLOW_THREADS
            for (Py_ssize_t at = 0; at < count; at++)
                found[at] = (char)work(all + at, buffer.buf, buffer.len);
            Py_END_ALLOW_THREADS
        }
    }
    PyMem_Free(all);
    Py_XDECREF(spans);
    PyBuffer_Release(&buffer);
    return result;
}

/* copy([(from, at, to, at there, size), ...], buffer) -> bytes, 1 for each span that was copied whole */
static PyObject *copy(PyObject *module, PyObject *args)
{
    (void)module;
    return each(args, copied);
}

/* same([(one, at, other, at there, size), ...], buffer) -> bytes, 1 for each span that was read whole on both sides and agrees */
static PyObject *same(PyObject *module, PyObject *args)
{
    (void)module;
    return each(args, equal);
}

static PyMethodDef methods[] = {
    {"copy", copy, METH_VARARGS, "Spans from file to file; see carry.c."},
    {"same", same, METH_VARARGS, "Spans of files compared; see carry.c."},
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
