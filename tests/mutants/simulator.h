/* Several tasks on a simulated machine, one at a time: at every use of shared memory a seed decides who goes on, and which
 * of the stores that a task has made become visible to the others.
 *
 * Memory is x86-TSO: a task's stores wait in a queue of its own, in order; it sees its own; a fence, or a system call that
 * takes a lock, waits until all are out. The clock is a number that grows with each reading, the same for all. Outside
 * sim_run() everything happens at once. What a seed found, it finds again.
 */
#ifndef SIMULATOR_H
#define SIMULATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SIM_TASKS 8

struct sim_task {
    void (*run)(void *context);
    void *context;
    unsigned serves;                     /* 0: it ends by itself. Else when those with a lower number have, and those
                                            with a higher one have nothing to do */
};

/* Runs the tasks to their ends. False when they stand still: each that has not ended waits for what nobody will do. */
bool sim_run(const struct sim_task *tasks, unsigned count, uint64_t seed);
/* In a task: waits until ready(context), which looks at sockets and private memory only. False in a task that
 * serves, when it is to end. */
bool sim_wait(bool (*ready)(void *context), void *context);
/* 0 … below - 1. */
uint32_t sim_random(uint32_t below);

void sim_point(void);
uint64_t sim_load(const void *word, unsigned size);
void sim_store(void *word, uint64_t value, unsigned size);
void sim_fence(void);
void sim_copy(void *destination, const void *source, size_t length);
uint64_t sim_now_ns(void);

#endif
