/* Fused passes over gradients and optimizer state: the arithmetic of accumulation.py and optimizer.py, element by
 * element, each operation rounded by itself, so the same bits as there. elaswave/runtime/kernels.py is the interface;
 * docs/adr/0017-compiled-kernels.md says why there are two.
 *
 * Compiled without contraction of a multiplication and an addition, and without any reordering: setup is in
 * pyproject.toml. Callers guarantee that addresses are valid for the lengths given and that nothing overlaps. */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define CLONED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONED
#endif

#define PIECE 2048 /* elements looked at for range before they are added: 8 KiB stay in the first cache */
#define KEEP_LOCK_BELOW 16384 /* elements; giving the interpreter's lock away and back costs about as much */

/* ------------------------------------------------------------------ elementwise passes */

CLONED static void widen(float *restrict into, const uint16_t *restrict from, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(into + i, &bits, 4);
    }
}

CLONED static void plain_begin(float *restrict total, const float *restrict from, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) total[i] = from[i] + 0.0f; /* minus zero becomes zero, as in a sum */
}

CLONED static void plain_add(float *restrict total, const float *restrict from, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) total[i] += from[i];
}

CLONED static int within(const float *restrict from, Py_ssize_t n, float bound) {
    int outside = 0;
    for (Py_ssize_t i = 0; i < n; i++) outside |= !(fabsf(from[i]) <= bound); /* not a number is outside, too */
    return !outside;
}

CLONED static int finite32(const uint32_t *bits, Py_ssize_t n) {
    int not_finite = 0;
    for (Py_ssize_t i = 0; i < n; i++) not_finite |= (bits[i] & 0x7f800000u) == 0x7f800000u;
    return !not_finite;
}

CLONED static int finite16(const uint16_t *bits, Py_ssize_t n) {
    int not_finite = 0;
    for (Py_ssize_t i = 0; i < n; i++) not_finite |= (bits[i] & 0x7f80u) == 0x7f80u;
    return !not_finite;
}

CLONED static void exact_begin(double *restrict total, const float *restrict from, Py_ssize_t n, double rounder) {
    for (Py_ssize_t i = 0; i < n; i++) total[i] = ((double)from[i] + rounder) - rounder;
}

CLONED static void exact_add(double *restrict total, const float *restrict from, Py_ssize_t n, double rounder) {
    for (Py_ssize_t i = 0; i < n; i++) total[i] += ((double)from[i] + rounder) - rounder;
}

static long long saturate(float *into, const float *from, Py_ssize_t n, float bound) {
    long long replaced = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        float value = from[i];
        if (!isfinite(value)) {
            value = NAN;
        } else if (fabsf(value) > bound) {
            value = copysignf(bound, value);
            replaced++;
        }
        into[i] = value;
    }
    return replaced;
}

CLONED static void adamw(float *restrict master, float *restrict average, float *restrict square,
                         const float *restrict gradient, Py_ssize_t n, const float *restrict c) {
    const float scale = c[0], beta1 = c[1], rest1 = c[2], beta2 = c[3], rest2 = c[4];
    const float inverse_root = c[5], epsilon = c[6], rate = c[7], decay = c[8];
    for (Py_ssize_t i = 0; i < n; i++) {
        float g = gradient[i] * scale;
        float s = square[i] * beta2 + (g * g) * rest2;
        float a = average[i] * beta1 + g * rest1;
        square[i] = s;
        average[i] = a;
        master[i] = master[i] * decay - (a * rate) / (sqrtf(s) * inverse_root + epsilon);
    }
}

/* Four parts at a time, which memory can bring side by side; one after the other took up to twice as long. */
#define MEAN(NAME, TYPE)                                                                                        \
    CLONED static void NAME##_four(TYPE *restrict sum, TYPE *const *parts, Py_ssize_t at, Py_ssize_t n) {        \
        const TYPE *restrict a = parts[0] + at, *restrict b = parts[1] + at;                                     \
        const TYPE *restrict c = parts[2] + at, *restrict d = parts[3] + at;                                     \
        for (Py_ssize_t i = 0; i < n; i++) sum[i] = ((a[i] + b[i]) + c[i]) + d[i];                               \
    }                                                                                                            \
    CLONED static void NAME##_add(TYPE *restrict sum, const TYPE *restrict part, Py_ssize_t n) {                 \
        for (Py_ssize_t i = 0; i < n; i++) sum[i] += part[i];                                                    \
    }                                                                                                            \
    CLONED static void NAME##_divide(float *restrict into, const TYPE *restrict sum, Py_ssize_t n, TYPE by) {    \
        for (Py_ssize_t i = 0; i < n; i++) into[i] = (float)(sum[i] / by);                                       \
    }                                                                                                            \
    static void NAME(float *into, TYPE *const *parts, Py_ssize_t count, Py_ssize_t n, TYPE by) {                 \
        TYPE sum[PIECE];                                                                                         \
        for (Py_ssize_t start = 0; start < n; start += PIECE) {                                                  \
            Py_ssize_t length = n - start < PIECE ? n - start : PIECE, done = count < 4 ? 1 : 4;                 \
            if (done == 4) NAME##_four(sum, parts, start, length);                                               \
            else memcpy(sum, parts[0] + start, length * sizeof(TYPE));                                           \
            for (; done < count; done++) NAME##_add(sum, parts[done] + start, length);                           \
            NAME##_divide(into + start, sum, length, by);                                                        \
        }                                                                                                        \
    }
MEAN(mean32, float)
MEAN(mean64, double)

/* ------------------------------------------------------------------ contributions */

typedef struct {
    char *total;          /* float, or double where `exact` */
    long long elements;   /* of the total */
    const int64_t *spans; /* start and length of each parameter, ascending */
    Py_ssize_t count;
    char **sources; /* NULL: zeros */
    int bfloat16, begin, exact;
    double rounder;
    float bound;
} Contribution;

static long long add_piece(const Contribution *job, int64_t at, const float *from, Py_ssize_t n) {
    if (!job->exact) {
        (job->begin ? plain_begin : plain_add)((float *)job->total + at, from, n);
        return 0;
    }
    float limited[PIECE];
    long long replaced = 0;
    if (!within(from, n, job->bound)) {
        replaced = saturate(limited, from, n, job->bound);
        from = limited;
    }
    (job->begin ? exact_begin : exact_add)((double *)job->total + at, from, n, job->rounder);
    return replaced;
}

static void clear(const Contribution *job, int64_t from, int64_t to) {
    size_t width = job->exact ? sizeof(double) : sizeof(float);
    if (job->begin && to > from) memset(job->total + from * width, 0, (to - from) * width);
}

static long long accumulate(const Contribution *job) {
    float widened[PIECE];
    long long replaced = 0;
    int64_t done = 0;
    for (Py_ssize_t index = 0; index < job->count; index++) {
        int64_t start = job->spans[2 * index], length = job->spans[2 * index + 1];
        const char *source = job->sources[index];
        clear(job, done, source ? start : start + length);
        done = start + length;
        for (int64_t at = 0; source && at < length; at += PIECE) {
            Py_ssize_t n = length - at < PIECE ? length - at : PIECE;
            const float *from = (const float *)source + at;
            if (job->bfloat16) {
                widen(widened, (const uint16_t *)source + at, n);
                from = widened;
            }
            replaced += add_piece(job, start + at, from, n);
        }
    }
    clear(job, done, job->elements);
    return replaced;
}

/* ------------------------------------------------------------------ interface */

/* Addresses in a list of ints; the array is to be freed. NULL with an exception set. */
static char **addresses_of(PyObject *list, Py_ssize_t *count) {
    *count = PyList_Size(list);
    if (*count < 0) return NULL;
    char **found = PyMem_Malloc((*count ? *count : 1) * sizeof(char *));
    if (!found) return (char **)PyErr_NoMemory();
    for (Py_ssize_t index = 0; index < *count; index++) {
        found[index] = PyLong_AsVoidPtr(PyList_GetItem(list, index));
        if (PyErr_Occurred()) {
            PyMem_Free(found);
            return NULL;
        }
    }
    return found;
}

/* Names of what tensors are asked; made once, since making them costs as much as asking. */
static PyObject *name_dtype, *name_is_cpu, *name_is_contiguous, *name_numel, *name_data_ptr;

static int answer_of(PyObject *tensor, PyObject *method, int64_t *answer) {
    PyObject *found = PyObject_CallMethodObjArgs(tensor, method, NULL);
    if (!found) return 0;
    *answer = (int64_t)PyLong_AsUnsignedLongLong(found); /* a bool is an int */
    Py_DECREF(found);
    return !PyErr_Occurred();
}

static int attribute_is(PyObject *tensor, PyObject *name, PyObject *wanted) {
    PyObject *found = PyObject_GetAttr(tensor, name);
    Py_XDECREF(found);
    return found == wanted;
}

/* Where the values of a tensor lie, if it is in host memory, row-major, of this type and length; else an exception. */
static char *values_of(PyObject *tensor, PyObject *dtype, int64_t length) {
    int64_t contiguous = 0, elements = 0, address = 0;
    int right = attribute_is(tensor, name_dtype, dtype) && attribute_is(tensor, name_is_cpu, Py_True);
    if (PyErr_Occurred() || !answer_of(tensor, name_is_contiguous, &contiguous) ||
        !answer_of(tensor, name_numel, &elements) || !answer_of(tensor, name_data_ptr, &address))
        return NULL;
    if (!right || !contiguous || elements != length) {
        PyErr_Format(PyExc_ValueError, "a kernel is given %lld elements, where %lld of %R are due, contiguous, on a CPU",
                     (long long)elements, (long long)length, dtype);
        return NULL;
    }
    return (char *)(uintptr_t)address;
}

static int check_spans(const Contribution *job, Py_ssize_t values) {
    int64_t done = 0;
    for (Py_ssize_t index = 0; index < job->count; index++) {
        int64_t start = job->spans[2 * index], length = job->spans[2 * index + 1];
        if (start < done || length < 0 || length > job->elements - start) {
            PyErr_Format(PyExc_ValueError, "span %zd overlaps the one before or ends behind the total", index);
            return 0;
        }
        done = start + length;
    }
    if (values != job->count) {
        PyErr_Format(PyExc_ValueError, "%zd values for %zd spans", values, job->count);
        return 0;
    }
    return 1;
}

/* Fills job->sources from a tuple of tensors, or None. */
static int find_sources(Contribution *job, PyObject *values, PyObject *dtype) {
    for (Py_ssize_t index = 0; index < job->count; index++) {
        PyObject *tensor = PyTuple_GetItem(values, index);
        job->sources[index] = NULL;
        if (tensor != Py_None && job->spans[2 * index + 1]) {
            job->sources[index] = values_of(tensor, dtype, job->spans[2 * index + 1]);
            if (!job->sources[index]) return 0;
        }
    }
    return 1;
}

/* (total, (elements, spans, values, dtype, bfloat16), begin, rounder, bound; below 0: float32)
 * -> number of elements replaced by the bound */
static PyObject *py_accumulate(PyObject *self, PyObject *args) {
    unsigned long long total;
    const char *spans;
    Py_ssize_t spans_bytes;
    PyObject *values, *dtype;
    Contribution job = {0};
    double bound;
    if (!PyArg_ParseTuple(args, "K(Ly#O!Op)pdd", &total, &job.elements, &spans, &spans_bytes, &PyTuple_Type, &values,
                          &dtype, &job.bfloat16, &job.begin, &job.rounder, &bound))
        return NULL;
    job.total = (char *)(uintptr_t)total;
    job.spans = (const int64_t *)spans;
    job.count = spans_bytes / (2 * (Py_ssize_t)sizeof(int64_t));
    job.exact = bound >= 0.0;
    job.bound = (float)bound;
    if (!check_spans(&job, PyTuple_Size(values))) return NULL;
    job.sources = PyMem_Malloc((job.count + 1) * sizeof(char *));
    if (!job.sources) return PyErr_NoMemory();
    long long replaced = 0;
    int sound = find_sources(&job, values, dtype);
    if (sound && job.elements < KEEP_LOCK_BELOW) {
        replaced = accumulate(&job);
    } else if (sound) {
        Py_BEGIN_ALLOW_THREADS
        replaced = accumulate(&job);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(job.sources);
    return sound ? PyLong_FromLongLong(replaced) : NULL;
}

/* (into, parts, elements, divisor, wide): into[i] = float(sum of parts[.][i] / divisor) */
static PyObject *py_mean(PyObject *self, PyObject *args) {
    unsigned long long into;
    long long elements;
    double divisor;
    int wide;
    PyObject *list;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "KO!Ldp", &into, &PyList_Type, &list, &elements, &divisor, &wide)) return NULL;
    char **parts = addresses_of(list, &count);
    if (!parts) return NULL;
    if (!count) {
        PyMem_Free(parts);
        PyErr_SetString(PyExc_ValueError, "a mean needs at least one part");
        return NULL;
    }
    float *to = (float *)(uintptr_t)into;
    Py_BEGIN_ALLOW_THREADS
    if (wide) mean64(to, (double *const *)parts, count, elements, divisor);
    else mean32(to, (float *const *)parts, count, elements, (float)divisor);
    Py_END_ALLOW_THREADS
    PyMem_Free(parts);
    Py_RETURN_NONE;
}

/* (vectors: master, average, square_average, gradient; elements, constants: 9 float32) */
static PyObject *py_adamw(PyObject *self, PyObject *args) {
    long long elements;
    const char *constants;
    Py_ssize_t constants_bytes, count;
    PyObject *list;
    if (!PyArg_ParseTuple(args, "O!Ly#", &PyList_Type, &list, &elements, &constants, &constants_bytes)) return NULL;
    char **found = addresses_of(list, &count);
    if (!found) return NULL;
    float **vectors = (float **)found;
    int right = count == 4 && constants_bytes == 9 * (Py_ssize_t)sizeof(float);
    if (right) {
        Py_BEGIN_ALLOW_THREADS
        adamw(vectors[0], vectors[1], vectors[2], vectors[3], elements, (const float *)constants);
        Py_END_ALLOW_THREADS
    }
    PyMem_Free(found);
    if (right) Py_RETURN_NONE;
    PyErr_Format(PyExc_ValueError, "%zd vectors and %zd bytes of constants: must be 4, and 9 of float32", count,
                 constants_bytes);
    return NULL;
}

/* (address, elements, bfloat16) -> whether no element is infinite or not a number */
static PyObject *py_finite(PyObject *self, PyObject *args) {
    unsigned long long address;
    long long elements;
    int bfloat16, found;
    if (!PyArg_ParseTuple(args, "KLp", &address, &elements, &bfloat16)) return NULL;
    const void *values = (const void *)(uintptr_t)address;
    Py_BEGIN_ALLOW_THREADS
    found = bfloat16 ? finite16((const uint16_t *)values, elements) : finite32((const uint32_t *)values, elements);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(found);
}

static PyMethodDef methods[] = {
    {"accumulate", py_accumulate, METH_VARARGS, NULL},
    {"mean", py_mean, METH_VARARGS, NULL},
    {"adamw", py_adamw, METH_VARARGS, NULL},
    {"finite", py_finite, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) {
    name_dtype = PyUnicode_InternFromString("dtype");
    name_is_cpu = PyUnicode_InternFromString("is_cpu");
    name_is_contiguous = PyUnicode_InternFromString("is_contiguous");
    name_numel = PyUnicode_InternFromString("numel");
    name_data_ptr = PyUnicode_InternFromString("data_ptr");
    if (!name_dtype || !name_is_cpu || !name_is_contiguous || !name_numel || !name_data_ptr) return NULL;
    return PyModule_Create(&module);
}
