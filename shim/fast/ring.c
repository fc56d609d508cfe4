/* A queue of messages: what collections.deque is, for callers in C. */
#include "fast.h"

enum { FIRST_CAPACITY = 8, KEPT_CAPACITY = 1024 };

PyTypeObject *fast_ring_type;

struct fast_ring *fast_ring_new(void)
{
    struct fast_ring *ring = PyObject_GC_New(struct fast_ring, fast_ring_type);
    if (!ring)
        return NULL;
    ring->items = NULL;
    ring->capacity = ring->first = ring->count = 0;
    PyObject_GC_Track(ring);
    return ring;
}

static PyObject *new_ring(PyTypeObject *type, PyObject *arguments, PyObject *names)
{
    (void)type, (void)arguments, (void)names;
    return (PyObject *)fast_ring_new();
}

static int grow(struct fast_ring *ring)
{
    size_t capacity = ring->capacity ? 2 * ring->capacity : FIRST_CAPACITY;
    PyObject **items = PyMem_Malloc(capacity * sizeof *items);
    if (!items) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < ring->count; i++)
        items[i] = ring->items[(ring->first + i) & (ring->capacity - 1)];
    PyMem_Free(ring->items);
    ring->items = items;
    ring->capacity = capacity;
    ring->first = 0;
    return 0;
}

int fast_ring_push_untracked(struct fast_ring *ring, PyObject *message)
{
    PyObject_GC_UnTrack(message);
    if (fast_ring_push(ring, message) == 0)
        return 0;
    PyObject_GC_Track(message);
    return -1;
}

int fast_ring_push(struct fast_ring *ring, PyObject *item)
{
    if (ring->count == ring->capacity && grow(ring))
        return -1;
    Py_INCREF(item);
    ring->items[(ring->first + ring->count++) & (ring->capacity - 1)] = item;
    return 0;
}

PyObject *fast_ring_pop(struct fast_ring *ring)
{
    PyObject *item = ring->items[ring->first];
    if (fast_is_message(item) && !PyObject_GC_IsTracked(item))
        PyObject_GC_Track(item);
    ring->first = (ring->first + 1) & (ring->capacity - 1);
    if (--ring->count == 0 && ring->capacity > KEPT_CAPACITY) {
        PyMem_Free(ring->items);
        ring->items = NULL;
        ring->capacity = ring->first = 0;
    }
    return item;
}

static PyObject *append(PyObject *self, PyObject *item)
{
    if (fast_ring_push((struct fast_ring *)self, item))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *popleft(PyObject *self, PyObject *unused)
{
    (void)unused;
    struct fast_ring *ring = (struct fast_ring *)self;
    if (!ring->count) {
        PyErr_SetString(PyExc_IndexError, "pop from an empty ring");
        return NULL;
    }
    return fast_ring_pop(ring);
}

static int empty(PyObject *self)
{
    struct fast_ring *ring = (struct fast_ring *)self;
    while (ring->count) {
        PyObject *item = fast_ring_pop(ring);
        Py_DECREF(item);
    }
    return 0;
}

static PyObject *clear(PyObject *self, PyObject *unused)
{
    (void)unused;
    empty(self);
    Py_RETURN_NONE;
}

static Py_ssize_t length(PyObject *self)
{
    return (Py_ssize_t)((struct fast_ring *)self)->count;
}

static PyObject *iterate(PyObject *self)
{
    struct fast_ring *ring = (struct fast_ring *)self;
    PyObject *list = PyList_New(0); /* which may run finalizers: the ring is looked at behind it */
    if (!list)
        return NULL;
    for (size_t i = 0; i < ring->count; i++) {
        if (PyList_Append(list, ring->items[(ring->first + i) & (ring->capacity - 1)])) {
            Py_DECREF(list);
            return NULL;
        }
    }
    PyObject *iterator = PyObject_GetIter(list);
    Py_DECREF(list);
    return iterator;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    struct fast_ring *ring = (struct fast_ring *)self;
    Py_VISIT(Py_TYPE(self));
    for (size_t i = 0; i < ring->count; i++) {
        PyObject *item = ring->items[(ring->first + i) & (ring->capacity - 1)];
        /* What only the ring knows of is looked at as a part of it. */
        if (Py_REFCNT(item) == 1 && fast_looks_like_message(item) && !PyObject_GC_IsTracked(item)) {
            int result = fast_message_traverse(item, visit, arg);
            if (result)
                return result;
        } else {
            Py_VISIT(item);
        }
    }
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    empty(self);
    PyMem_Free(((struct fast_ring *)self)->items);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"append", append, METH_O, "append($self, item, /)\n--\n\nAdds the item behind all others."},
    {"popleft", popleft, METH_NOARGS, "popleft($self, /)\n--\n\nTakes the first item out; IndexError when there is none."},
    {"clear", clear, METH_NOARGS, "clear($self, /)\n--\n\nDrops all items."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "A queue of messages."},
    {Py_tp_new, new_ring},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, empty},
    {Py_tp_methods, methods},
    {Py_tp_iter, iterate},
    {Py_sq_length, length},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "insane_nats._fast.Ring",
    .basicsize = sizeof(struct fast_ring),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int fast_add_ring(PyObject *module)
{
    fast_ring_type = fast_add_type(module, &spec);
    return fast_ring_type ? 0 : -1;
}
