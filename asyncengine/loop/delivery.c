/* The compiled half of `delivery.py`: handing a step's tokens to the branches that they are for, and reading them with
 * `async for`. It works on the very same objects as the Python code, reading the slots of `Branch` where they lie, and
 * leaves whatever is rare to the methods of `RequestStream`. Everything here runs on an event loop, with the GIL.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

/* The slots of `Branch` that are used here. */
typedef enum { IDS, READ, STREAMING, WAITER, FIELDS } Field;
static const char *const field_names[FIELDS] = {"ids", "read", "streaming", "waiter"};

typedef struct {
    PyTypeObject *branch;
    PyTypeObject *output;
    PyObject *invalid_state;
    Py_ssize_t offsets[FIELDS];
    PyObject *empty, *zero;
} Known;
static Known known;

static PyObject *str_set_result, *str_blocking, *str_done, *str_next_now, *str_leave, *str_expect;
static PyObject *str_skipped, *str_aclose;

static inline PyObject **
slot(PyObject *branch, Field field)
{
    return (PyObject **)((char *)branch + known.offsets[field]);
}

static inline void
set_slot(PyObject *branch, Field field, PyObject *value /* stolen */)
{
    PyObject **at = slot(branch, field), *old = *at;
    *at = value;
    Py_XDECREF(old);
}

static int
check_branch(PyObject *branch)
{
    if (Py_TYPE(branch) != known.branch) {
        PyErr_Format(PyExc_TypeError, "expected a Branch, not %s", Py_TYPE(branch)->tp_name);
        return -1;
    }
    return 0;
}

/* deliver_tokens(branches, token_ids): gives each branch its token and wakes whoever waits for it. */

static PyObject *
deliver_tokens(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2 || !PyList_CheckExact(args[0]) || !PyList_CheckExact(args[1])) {
        PyErr_SetString(PyExc_TypeError, "deliver_tokens takes a list of branches and a list of tokens");
        return NULL;
    }
    PyObject *branches = args[0], *tokens = args[1];
    if (PyList_GET_SIZE(branches) != PyList_GET_SIZE(tokens)) {
        PyErr_SetString(PyExc_ValueError, "there are not as many tokens as branches");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(branches) && i < PyList_GET_SIZE(tokens); i++) {
        PyObject *branch = PyList_GET_ITEM(branches, i);
        if (check_branch(branch) < 0 || PyList_Append(*slot(branch, IDS), PyList_GET_ITEM(tokens, i)) < 0) {
            return NULL;
        }
        PyObject *waiter = *slot(branch, WAITER);
        if (waiter == Py_None) {
            continue;
        }
        *slot(branch, WAITER) = Py_NewRef(Py_None); /* `waiter` is ours now */
        PyObject *done = PyObject_CallMethodOneArg(waiter, str_set_result, Py_None);
        Py_DECREF(waiter);
        if (done == NULL) {
            if (!PyErr_ExceptionMatches(known.invalid_state)) {
                return NULL;
            }
            PyErr_Clear(); /* it is being cancelled */
        }
        Py_XDECREF(done);
    }
    Py_RETURN_NONE;
}

/* Reader(stream, branch, create_future): what `async for` iterates over.
 *
 * It is its own awaitable, and a coroutine as far as anyone can see: `__anext__` returns it, and sending to it yields the
 * future to wait for, or returns a delta. No object is made per delta but the delta. One task reads at a time, which
 * `RequestStream` sees to whenever a reader is about to wait.
 */

typedef struct {
    PyObject_HEAD
    PyObject *stream;
    PyObject *branch;  /* the stream's only one, if nothing but tokens is wanted of it; else NULL */
    PyObject *create_future;
    PyObject *waiting; /* the future that was given to the reading task, or NULL */
} Reader;

static PyObject *
reader_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *stream, *branch, *create_future;
    if (!PyArg_ParseTuple(args, "OOO", &stream, &branch, &create_future)) {
        return NULL;
    }
    if (branch != Py_None && check_branch(branch) < 0) {
        return NULL;
    }
    Reader *self = (Reader *)type->tp_alloc(type, 0);
    if (self != NULL) {
        self->stream = Py_NewRef(stream);
        self->branch = branch == Py_None ? NULL : Py_NewRef(branch);
        self->create_future = Py_NewRef(create_future);
    }
    return (PyObject *)self;
}

static int
reader_traverse(Reader *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->stream);
    Py_VISIT(self->branch);
    Py_VISIT(self->create_future);
    Py_VISIT(self->waiting);
    return 0;
}

static int
reader_clear(Reader *self)
{
    Py_CLEAR(self->stream);
    Py_CLEAR(self->branch);
    Py_CLEAR(self->create_future);
    Py_CLEAR(self->waiting);
    return 0;
}

static void
reader_dealloc(Reader *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (self->waiting != NULL && PyObject_CallFinalizerFromDealloc((PyObject *)self) < 0) {
        return; /* it lives on */
    }
    PyObject_GC_UnTrack(self);
    reader_clear(self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *
reader_self(PyObject *self)
{
    return Py_NewRef(self);
}

/* A delta of nothing but tokens; NULL with an exception set if memory runs out. */
static PyObject *
take(Reader *self, Py_ssize_t start, Py_ssize_t end)
{
    PyObject *ids = PyList_GetSlice(*slot(self->branch, IDS), start, end);
    PyObject *read = PyLong_FromSsize_t(end);
    PyObject *output = ids && read ? known.output->tp_alloc(known.output, 6) : NULL;
    if (output == NULL) {
        Py_XDECREF(ids);
        Py_XDECREF(read);
        return NULL;
    }
#if PY_VERSION_HEX >= 0x030E0000
    ((PyTupleObject *)output)->ob_hash = -1; /* not known yet; 0 would be taken for it */
#endif
    PyTuple_SET_ITEM(output, 0, Py_NewRef(known.empty));
    PyTuple_SET_ITEM(output, 1, ids);
    PyTuple_SET_ITEM(output, 2, Py_NewRef(Py_None));
    PyTuple_SET_ITEM(output, 3, Py_NewRef(known.zero));
    PyTuple_SET_ITEM(output, 4, Py_NewRef(Py_None));
    PyTuple_SET_ITEM(output, 5, Py_NewRef(Py_None));
    set_slot(self->branch, READ, read);
    if (end - start > 1) {
        PyObject *skipped = PyLong_FromSsize_t(end - start - 1);
        PyObject *done = skipped ? PyObject_CallMethodOneArg(self->stream, str_skipped, skipped) : NULL;
        Py_XDECREF(skipped);
        if (done == NULL) {
            Py_DECREF(output);
            return NULL;
        }
        Py_DECREF(done);
    }
    return output;
}

static PySendResult
reader_send(Reader *self, PyObject *value, PyObject **result)
{
    *result = NULL;
    if (self->waiting != NULL) {
        PyObject *done = PyObject_CallMethodNoArgs(self->waiting, str_done);
        if (done == NULL) {
            return PYGEN_ERROR;
        }
        int is_done = PyObject_IsTrue(done);
        Py_DECREF(done);
        if (is_done < 0) {
            return PYGEN_ERROR;
        }
        if (is_done) {
            Py_CLEAR(self->waiting);
        }
        /* else another task waits, which is found out below, or there is something to take */
    }
    PyObject *branch = self->branch;
    int plain = branch != NULL && *slot(branch, STREAMING) == Py_True;
    if (plain) {
        Py_ssize_t end = PyList_Size(*slot(branch, IDS));
        Py_ssize_t start = PyLong_AsSsize_t(*slot(branch, READ));
        if (start < end) {
            *result = take(self, start, end);
            return *result ? PYGEN_RETURN : PYGEN_ERROR;
        }
    }
    else {
        *result = PyObject_CallMethodNoArgs(self->stream, str_next_now);
        if (*result == NULL) {
            return PYGEN_ERROR;
        }
        if (*result != Py_None) {
            return PYGEN_RETURN;
        }
        Py_CLEAR(*result);
    }
    PyObject *future = PyObject_CallNoArgs(self->create_future);
    if (future == NULL) {
        return PYGEN_ERROR;
    }
    if (plain && *slot(branch, WAITER) == Py_None) {
        set_slot(branch, WAITER, Py_NewRef(future));
    }
    else {
        PyObject *done = PyObject_CallMethodOneArg(self->stream, str_expect, future);
        if (done == NULL) {
            Py_DECREF(future);
            return PYGEN_ERROR;
        }
        Py_DECREF(done);
    }
    if (PyObject_SetAttr(future, str_blocking, Py_True) < 0) {
        Py_DECREF(future);
        return PYGEN_ERROR;
    }
    Py_XSETREF(self->waiting, Py_NewRef(future));
    *result = future;
    return PYGEN_NEXT;
}

static PyObject *
reader_step(Reader *self)
{
    PyObject *result;
    switch (reader_send(self, Py_None, &result)) {
        case PYGEN_NEXT:
            return result;
        case PYGEN_RETURN: {
            PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, result);
            Py_DECREF(result);
            if (stop != NULL) {
                PyErr_SetObject(PyExc_StopIteration, stop);
                Py_DECREF(stop);
            }
            return NULL;
        }
        default:
            return NULL;
    }
}

static PyObject *
reader_send_method(PyObject *self, PyObject *value)
{
    return reader_step((Reader *)self);
}

/* The reader is cancelled, by an error, or closed, by none: it leaves, and leaving is aborting. */
static int
leave(Reader *self, PyObject *error)
{
    if (self->waiting == NULL) {
        return 0;
    }
    PyObject *waiting = self->waiting;
    self->waiting = NULL;
    PyObject *done = PyObject_CallMethodObjArgs(self->stream, str_leave, waiting, error, NULL);
    Py_DECREF(waiting);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static PyObject *
reader_throw(Reader *self, PyObject *args)
{
    PyObject *type, *value = Py_None, *traceback = Py_None;
    if (!PyArg_UnpackTuple(args, "throw", 1, 3, &type, &value, &traceback)) {
        return NULL;
    }
    PyObject *error;
    if (PyExceptionInstance_Check(type)) {
        error = Py_NewRef(type);
    }
    else if (PyExceptionClass_Check(type)) {
        if (PyExceptionInstance_Check(value)) {
            error = Py_NewRef(value);
        }
        else {
            error = value == Py_None ? PyObject_CallNoArgs(type) : PyObject_CallOneArg(type, value);
        }
        if (error == NULL) {
            return NULL;
        }
    }
    else {
        PyErr_SetString(PyExc_TypeError, "throw takes an exception");
        return NULL;
    }
    if (traceback != Py_None && PyException_SetTraceback(error, traceback) < 0) {
        Py_DECREF(error);
        return NULL;
    }
    if (leave(self, error) < 0) {
        PyObject *other_type, *other, *other_traceback;
        PyErr_Fetch(&other_type, &other, &other_traceback);
        PyErr_NormalizeException(&other_type, &other, &other_traceback);
        PyException_SetContext(other, error); /* stolen */
        PyErr_Restore(other_type, other, other_traceback);
        return NULL;
    }
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
    return NULL;
}

static PyObject *
reader_close(Reader *self, PyObject *unused)
{
    if (leave(self, Py_None) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* The stream's own: whoever waits, by this reader or another, finds the end of the iteration. */
static PyObject *
reader_aclose(Reader *self, PyObject *unused)
{
    return PyObject_CallMethodNoArgs(self->stream, str_aclose);
}

/* It is dropped; while it waits, that is leaving, as it is with a coroutine. */
static void
reader_finalize(PyObject *self)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (leave((Reader *)self, Py_None) < 0) {
        PyErr_WriteUnraisable(self);
    }
    PyErr_Restore(type, error, traceback);
}

static PyMethodDef reader_methods[] = {
    {"send", (PyCFunction)reader_send_method, METH_O, NULL},
    {"throw", (PyCFunction)reader_throw, METH_VARARGS, NULL},
    {"close", (PyCFunction)reader_close, METH_NOARGS, NULL},
    {"aclose", (PyCFunction)reader_aclose, METH_NOARGS, NULL},
    {NULL},
};

static PyType_Slot reader_slots[] = {
    {Py_tp_new, reader_new},
    {Py_tp_dealloc, reader_dealloc},
    {Py_tp_finalize, reader_finalize},
    {Py_tp_traverse, reader_traverse},
    {Py_tp_clear, reader_clear},
    {Py_tp_iter, reader_self},
    {Py_tp_iternext, reader_step},
    {Py_tp_methods, reader_methods},
    {Py_am_aiter, reader_self},
    {Py_am_anext, reader_self},
    {Py_am_await, reader_self},
    {Py_am_send, reader_send},
    {0, NULL},
};

static PyType_Spec reader_spec = {
    .name = "delivery.Reader",
    .basicsize = sizeof(Reader),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = reader_slots,
};

/* know(Branch, RequestOutput, InvalidStateError): looks up where the slots of a branch lie. */
static PyObject *
know(PyObject *module, PyObject *args)
{
    PyObject *branch, *output, *invalid_state;
    if (!PyArg_ParseTuple(args, "O!O!O", &PyType_Type, &branch, &PyType_Type, &output, &invalid_state)) {
        return NULL;
    }
    if (!PyType_IsSubtype((PyTypeObject *)output, &PyTuple_Type)) {
        PyErr_SetString(PyExc_TypeError, "outputs must be tuples");
        return NULL;
    }
    for (int field = 0; field < FIELDS; field++) {
        PyObject *descriptor = PyObject_GetAttrString(branch, field_names[field]);
        if (descriptor == NULL) {
            return NULL;
        }
        if (!Py_IS_TYPE(descriptor, &PyMemberDescr_Type)) {
            PyErr_Format(PyExc_TypeError, "%s is not a slot", field_names[field]);
            Py_DECREF(descriptor);
            return NULL;
        }
        known.offsets[field] = ((PyMemberDescrObject *)descriptor)->d_member->offset;
        Py_DECREF(descriptor);
    }
    Py_XSETREF(known.branch, (PyTypeObject *)Py_NewRef(branch));
    Py_XSETREF(known.output, (PyTypeObject *)Py_NewRef(output));
    Py_XSETREF(known.invalid_state, Py_NewRef(invalid_state));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"deliver_tokens", (PyCFunction)(void (*)(void))deliver_tokens, METH_FASTCALL, NULL},
    {"know", know, METH_VARARGS, NULL},
    {NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "delivery", NULL, -1, functions};

PyMODINIT_FUNC
PyInit_delivery(void)
{
    known.empty = PyUnicode_FromString("");
    known.zero = PyLong_FromLong(0);
    str_set_result = PyUnicode_InternFromString("set_result");
    str_blocking = PyUnicode_InternFromString("_asyncio_future_blocking");
    str_done = PyUnicode_InternFromString("done");
    str_next_now = PyUnicode_InternFromString("_next_now");
    str_leave = PyUnicode_InternFromString("_leave");
    str_expect = PyUnicode_InternFromString("wait_with");
    str_aclose = PyUnicode_InternFromString("aclose");
    str_skipped = PyUnicode_InternFromString("_note_merged");
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL) {
        return NULL;
    }
    PyObject *reader = PyType_FromSpec(&reader_spec);
    if (reader == NULL || PyModule_AddObject(module, "Reader", reader) < 0) {
        Py_XDECREF(reader);
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
