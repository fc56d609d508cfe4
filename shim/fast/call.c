/* A call that `await` finishes at once when it can, lets the event loop go round when it is time, and hands over to a coroutine
 * when there is something to wait for. It is a coroutine for asyncio: tasks take it, and it does nothing before its first
 * step. */
#include "fast.h"

#include <string.h>

PyTypeObject *fast_call_type;

PyObject *fast_call_new(fast_run run, const char *name, PyObject *owner, PyObject *const argument[FAST_ARGUMENTS])
{
    struct fast_call *call = PyObject_GC_New(struct fast_call, fast_call_type);
    if (!call)
        return NULL;
    call->run = run;
    call->name = name;
    Py_INCREF(owner);
    call->owner = owner;
    for (int i = 0; i < FAST_ARGUMENTS; i++) {
        Py_XINCREF(argument[i]);
        call->argument[i] = argument[i];
    }
    call->inner = NULL;
    call->started = call->running = call->passed = call->finished = 0;
    return (PyObject *)call;
}

/* Only one that waits can be part of a cycle. */
static void waits(struct fast_call *call)
{
    if (!PyObject_GC_IsTracked((PyObject *)call))
        PyObject_GC_Track(call);
}

enum fast_step fast_delegate(struct fast_call *call, PyObject *owner, PyObject *name, PyObject *a, PyObject *b, PyObject *c,
                             PyObject *d)
{
    call->inner = PyObject_CallMethodObjArgs(owner, name, a, b, c, d, NULL);
    if (!call->inner)
        return FAST_FAILED;
    waits(call);
    return FAST_DELEGATE;
}

/* True with an exception when no step can be taken. */
static bool is_over(const struct fast_call *call)
{
    if (call->running)
        PyErr_SetString(PyExc_ValueError, "coroutine already executing");
    else if (call->finished)
        PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
    return call->running || call->finished;
}

/* One step, as `await` takes it. */
static PySendResult call_send(PyObject *self, PyObject *value, PyObject **result)
{
    struct fast_call *call = (struct fast_call *)self;
    *result = NULL;
    if (is_over(call))
        return PYGEN_ERROR;
    if (!call->started && value != Py_None) {
        PyErr_SetString(PyExc_TypeError, "can't send non-None value to a just-started coroutine");
        return PYGEN_ERROR;
    }
    call->started = call->running = 1;
    enum fast_step step = call->inner ? FAST_DELEGATE : call->run(call, result);
    if (step == FAST_PASS) {
        waits(call);
        call->running = 0;
        call->passed = 1;
        Py_INCREF(Py_None);
        *result = Py_None;
        return PYGEN_NEXT;
    }
    if (step == FAST_DELEGATE) {
        PySendResult inner = PyIter_Send(call->inner, value, result);
        call->running = 0;
        call->finished = inner != PYGEN_NEXT;
        return inner;
    }
    call->running = 0;
    call->finished = 1;
    return step == FAST_DONE ? PYGEN_RETURN : PYGEN_ERROR;
}

/* The result of a step for callers that expect an iterator. */
static PyObject *as_iterator(PySendResult said, PyObject *result)
{
    if (said == PYGEN_NEXT)
        return result;
    if (said == PYGEN_RETURN) {
        PyObject *stop = PyObject_CallFunctionObjArgs(PyExc_StopIteration, result, NULL); /* a tuple stays one value */
        if (stop) {
            PyErr_SetObject(PyExc_StopIteration, stop);
            Py_DECREF(stop);
        }
        Py_DECREF(result);
    }
    return NULL;
}

static PyObject *send_method(PyObject *self, PyObject *value)
{
    PyObject *result;
    PySendResult said = call_send(self, value, &result);
    return as_iterator(said, result);
}

static PyObject *call_next(PyObject *self)
{
    return send_method(self, Py_None);
}

static PyObject *call_throw(PyObject *self, PyObject *arguments)
{
    struct fast_call *call = (struct fast_call *)self;
    if (is_over(call))
        return NULL;
    call->started = 1;
    if (call->inner) {
        call->running = 1;
        PyObject *method = PyObject_GetAttr(call->inner, fast_name_throw);
        PyObject *result = method ? PyObject_CallObject(method, arguments) : NULL;
        Py_XDECREF(method);
        call->running = 0;
        if (!result)
            call->finished = 1;
        return result;
    }
    call->finished = 1;
    PyObject *type, *value = NULL, *traceback = NULL;
    if (!PyArg_UnpackTuple(arguments, "throw", 1, 3, &type, &value, &traceback))
        return NULL;
    if (PyExceptionInstance_Check(type))
        PyErr_SetObject((PyObject *)Py_TYPE(type), type);
    else if (PyExceptionClass_Check(type))
        PyErr_SetObject(type, value);
    else
        PyErr_SetString(PyExc_TypeError, "exceptions must be classes or instances deriving from BaseException");
    return NULL;
}

static PyObject *call_close(PyObject *self, PyObject *unused)
{
    (void)unused;
    struct fast_call *call = (struct fast_call *)self;
    if (call->running) {
        is_over(call);
        return NULL;
    }
    bool ends = call->inner && !call->finished;
    call->started = call->finished = 1;
    if (ends)
        return PyObject_CallMethodObjArgs(call->inner, fast_name_close, NULL);
    Py_RETURN_NONE;
}

static PyObject *itself(PyObject *self)
{
    Py_INCREF(self);
    return self;
}

static void warn_never_awaited(struct fast_call *call)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "coroutine '%s' was never awaited", call->name))
        PyErr_WriteUnraisable(call->owner);
    PyErr_Restore(type, value, traceback);
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    struct fast_call *call = (struct fast_call *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(call->owner);
    for (int i = 0; i < FAST_ARGUMENTS; i++)
        Py_VISIT(call->argument[i]);
    Py_VISIT(call->inner);
    return 0;
}

static int clear(PyObject *self)
{
    struct fast_call *call = (struct fast_call *)self;
    Py_CLEAR(call->owner);
    for (int i = 0; i < FAST_ARGUMENTS; i++)
        Py_CLEAR(call->argument[i]);
    Py_CLEAR(call->inner);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    struct fast_call *call = (struct fast_call *)self;
    PyObject_GC_UnTrack(self);
    if (!call->started)
        warn_never_awaited(call);
    clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyObject *get_qualname(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(((struct fast_call *)self)->name);
}

static PyObject *get_name(PyObject *self, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(strrchr(((struct fast_call *)self)->name, '.') + 1);
}

static PyGetSetDef properties[] = {
    {"__name__", get_name, NULL, NULL, NULL},
    {"__qualname__", get_qualname, NULL, "As in the repr of a task.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef methods[] = {
    {"send", send_method, METH_O, "send($self, value, /)\n--\n\nTakes a step."},
    {"throw", call_throw, METH_VARARGS, "Raises an exception where it waits."},
    {"close", call_close, METH_NOARGS, "close($self, /)\n--\n\nEnds it where it waits."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "A coroutine that mostly needs no event loop."},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {Py_tp_iter, itself},
    {Py_tp_iternext, call_next},
    {Py_am_await, itself},
    {Py_am_send, call_send},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "insane_nats._fast.Call",
    .basicsize = sizeof(struct fast_call),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

int fast_add_call(PyObject *module)
{
    fast_call_type = fast_add_type(module, &spec);
    return fast_call_type ? 0 : -1;
}
