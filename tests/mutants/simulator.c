/* The simulated machine: tasks on stacks of their own, their stores' queues, and the dice. */
#include "simulator.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <ucontext.h>

#define STACK (256u << 10)
#define STORES 16u /* that a task can have on their way; above, the oldest goes out */

struct store {
    void *word;
    uint64_t value;
    unsigned size;
};

struct task {
    struct sim_task does;
    ucontext_t context;
    char *stack;
    bool done;
    bool (*ready)(void *context);
    void *ready_context;
    struct store stores[STORES];
    unsigned first, count;
};

static struct task tasks[SIM_TASKS];
static unsigned task_count;
static struct task *current;        /* NULL: outside sim_run */
static ucontext_t outside;
static bool still;
static uint64_t dice = 1, now_ns = 1000000000;
static uint32_t switch_in, drain_in; /* one in so many points */

static uint64_t throw_dice(void)
{
    dice ^= dice << 13;
    dice ^= dice >> 7;
    dice ^= dice << 17;
    return dice * 0x2545f4914f6cdd1dull;
}

uint32_t sim_random(uint32_t below) { return (uint32_t)((throw_dice() >> 32) * below >> 32); }

/* --- memory ------------------------------------------------------------------------------------------------------------ */

static void write_word(void *word, uint64_t value, unsigned size)
{
    if (size == 8)
        __atomic_store_n((uint64_t *)word, value, __ATOMIC_SEQ_CST);
    else
        __atomic_store_n((uint32_t *)word, (uint32_t)value, __ATOMIC_SEQ_CST);
}

static bool drain_one(struct task *task)
{
    if (!task->count)
        return false;
    const struct store *store = &task->stores[task->first];
    write_word(store->word, store->value, store->size);
    task->first = (task->first + 1) % STORES;
    task->count--;
    return true;
}

static void drain(struct task *task)
{
    while (drain_one(task))
        ;
}

uint64_t sim_load(const void *word, unsigned size)
{
    sim_point();
    for (unsigned i = current ? current->count : 0; i-- > 0;) {
        const struct store *store = &current->stores[(current->first + i) % STORES];
        if (store->word == word)
            return store->value;
    }
    return size == 8 ? __atomic_load_n((const uint64_t *)word, __ATOMIC_SEQ_CST)
                     : __atomic_load_n((const uint32_t *)word, __ATOMIC_SEQ_CST);
}

void sim_store(void *word, uint64_t value, unsigned size)
{
    if (!current) {
        write_word(word, value, size);
        return;
    }
    if (current->count == STORES)
        drain_one(current);
    current->stores[(current->first + current->count++) % STORES] = (struct store){word, value, size};
    sim_point();
}

void sim_fence(void)
{
    if (current)
        drain(current);
    sim_point();
}

/* What is copied becomes visible by a later store: at once is as good as any time before that. */
void sim_copy(void *destination, const void *source, size_t length)
{
    if (current)
        drain(current);
    if (length)
        memcpy(destination, source, length);
    sim_point();
}

uint64_t sim_now_ns(void)
{
    sim_point();
    return now_ns += 1 + sim_random(8);
}

/* --- system calls: most take a lock -------------------------------------------------------------------------------------- */

ssize_t __real_sendmsg(int socket, const struct msghdr *message, int flags);
ssize_t __wrap_sendmsg(int socket, const struct msghdr *message, int flags)
{
    sim_fence();
    return __real_sendmsg(socket, message, flags);
}

ssize_t __real_sendto(int socket, const void *bytes, size_t length, int flags, const struct sockaddr *to, socklen_t size);
ssize_t __wrap_sendto(int socket, const void *bytes, size_t length, int flags, const struct sockaddr *to, socklen_t size)
{
    sim_fence();
    return __real_sendto(socket, bytes, length, flags, to, size);
}

int __real_madvise(void *start, size_t length, int advice);
int __wrap_madvise(void *start, size_t length, int advice)
{
    sim_fence();
    return __real_madvise(start, length, advice);
}

/* What is random is so by the seed. */
ssize_t __wrap_getrandom(void *bytes, size_t length, unsigned flags)
{
    (void)flags;
    for (size_t i = 0; i < length; i++)
        ((uint8_t *)bytes)[i] = (uint8_t)sim_random(256);
    return (ssize_t)length;
}

/* --- tasks ---------------------------------------------------------------------------------------------------------------- */

static bool waits(const struct task *task) { return task->ready && !task->ready(task->ready_context); }

static bool is_to_end(const struct task *task)
{
    bool over = task->does.serves;
    for (unsigned i = 0; i < task_count && over; i++)
        over = tasks[i].done || tasks[i].does.serves == task->does.serves ||
               (tasks[i].does.serves > task->does.serves && waits(&tasks[i]));
    return over;
}

static bool runnable(struct task *task)
{
    if (task->done)
        return false;
    if (waits(task) && !is_to_end(task))
        return false;
    task->ready = NULL;
    return true;
}

/* From a random one on, the first that can go on. */
static struct task *choose(void)
{
    for (int attempt = 0; attempt < 2; attempt++) {
        unsigned start = sim_random(task_count);
        for (unsigned i = 0; i < task_count; i++)
            if (runnable(&tasks[(start + i) % task_count]))
                return &tasks[(start + i) % task_count];
        for (unsigned i = 0; i < task_count; i++) /* nobody: all that is on its way arrives */
            drain(&tasks[i]);
    }
    return NULL;
}

static void go_on(void)
{
    struct task *from = current;
    current = choose();
    if (current == from)
        return;
    if (!current) {
        for (unsigned i = 0; i < task_count; i++)
            still |= !tasks[i].done;
        setcontext(&outside);
    }
    if (from->done)
        setcontext(&current->context);
    else
        swapcontext(&from->context, &current->context);
}

void sim_point(void)
{
    if (!current)
        return;
    if (sim_random(drain_in) == 0)
        drain_one(&tasks[sim_random(task_count)]);
    if (sim_random(switch_in) == 0)
        go_on();
}

bool sim_wait(bool (*ready)(void *context), void *context)
{
    current->ready = ready;
    current->ready_context = context;
    go_on();
    return !is_to_end(current);
}

static void enter(void)
{
    current->does.run(current->does.context);
    drain(current);
    current->done = true;
    go_on();
}

bool sim_run(const struct sim_task *those, unsigned count, uint64_t seed)
{
    dice = seed * 0x9e3779b97f4a7c15ull | 1;
    throw_dice();
    switch_in = 1u << (1 + sim_random(6));
    drain_in = 1u << (1 + sim_random(6));
    task_count = count;
    still = false;
    for (unsigned i = 0; i < count; i++) {
        char *stack = tasks[i].stack ? tasks[i].stack : malloc(STACK);
        if (!stack)
            abort();
        tasks[i] = (struct task){.does = those[i], .stack = stack};
        getcontext(&tasks[i].context);
        tasks[i].context.uc_stack.ss_sp = stack;
        tasks[i].context.uc_stack.ss_size = STACK;
        makecontext(&tasks[i].context, enter, 0);
    }
    volatile bool over = false; /* read again when the last task comes back here */
    getcontext(&outside);
    if (!over) {
        over = true;
        current = &tasks[sim_random(count)];
        setcontext(&current->context);
    }
    current = NULL;
    for (unsigned i = 0; i < count; i++)
        drain(&tasks[i]);
    return !still;
}
