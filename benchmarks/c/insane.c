/* INSANE's primitives against a raw ring in shared memory: round trip of 64 bytes between two polling processes, on the same
 * processors in the same run. The aim on a quiet machine: below 0.5 us, and within four times the raw ring. */
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "../../tests/c/insane_node.h"

#define SIZE 64
#define ROUNDS 5                      /* of each, in turn: machines change their pace */
#define TRIPS 40000
#define CHANNEL 7
#define RING 64u                      /* slots */

/* As little as a ring can be: a slot has a sequence number and the bytes, in two cache lines of their own. */
struct ring {
    struct {
        uint64_t sequence __attribute__((aligned(128)));
        uint8_t bytes[SIZE];
    } slot[RING];
};
static struct ring *rings;            /* there and back */

static void ring_put(struct ring *ring, uint64_t number, const uint8_t *bytes)
{
    memcpy(ring->slot[number % RING].bytes, bytes, SIZE);
    nsn_store_release(&ring->slot[number % RING].sequence, number); /* pairs with ring_get() */
}

static void ring_get(struct ring *ring, uint64_t number, uint8_t *bytes)
{
    while (nsn_load_acquire(&ring->slot[number % RING].sequence) != number)
        nsn_cpu_relax();
    memcpy(bytes, ring->slot[number % RING].bytes, SIZE);
}

static void pin(int processor)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor % (int)sysconf(_SC_NPROCESSORS_ONLN), &set);
    sched_setaffinity(0, sizeof set, &set);
}

static pid_t start(void (*program)(struct insane_node *), struct insane_node *node)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pin(1);
    program(node);
    _exit(1);
}

static void raw_echo(struct insane_node *node)
{
    (void)node;
    uint8_t bytes[SIZE];
    for (uint64_t number = 1;; number++) {
        ring_get(&rings[0], number, bytes);
        ring_put(&rings[1], number, bytes);
    }
}

struct ends { struct nsn_insane *insane; uint32_t source, sink; };

static struct ends make_ends(struct insane_node *node)
{
    struct ends ends = {.insane = insane_session(node)};
    uint32_t stream = insane_stream(ends.insane, NSN_QOS_CONSUMPTION_POLL, NSN_QOS_RELIABILITY_RELIABLE);
    CHECK_EQUAL(nsn_insane_create_sink(ends.insane, stream, CHANNEL, NULL, &ends.sink), 0);
    CHECK_EQUAL(nsn_insane_create_source(ends.insane, stream, CHANNEL, &ends.source), 0);
    return ends;
}

static void insane_echo(struct insane_node *node)
{
    struct ends ends = make_ends(node);
    for (;;) {
        struct nsn_buffer *buffer;
        CHECK_EQUAL(nsn_insane_consume(ends.insane, ends.sink, UINT64_MAX, 0, &buffer), 0);
        CHECK(nsn_insane_emit(ends.insane, ends.source, buffer, 0) > 0);
    }
}

static int send_one(const struct ends *ends, const uint8_t *bytes)
{
    struct nsn_buffer *buffer = NULL;
    CHECK_EQUAL(nsn_insane_get_buffer(ends->insane, SIZE, UINT64_MAX, &buffer), 0);
    memcpy(buffer->data, bytes, SIZE);
    int token = nsn_insane_emit(ends->insane, ends->source, buffer, 0);
    CHECK(token > 0);
    return token;
}

static void insane_trip(const struct ends *ends, uint8_t *bytes)
{
    struct nsn_buffer *buffer;
    send_one(ends, bytes);
    CHECK_EQUAL(nsn_insane_consume(ends->insane, ends->sink, UINT64_MAX, 0, &buffer), 0);
    memcpy(bytes, buffer->data, SIZE);
    CHECK_EQUAL(nsn_insane_release(ends->insane, buffer), 1);
}

static int by_value(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return left < right ? -1 : left > right;
}

static uint32_t median(uint32_t *times, size_t count)
{
    qsort(times, count, sizeof *times, by_value);
    return times[count / 2];
}

int main(void)
{
    static uint32_t times[TRIPS], raw[ROUNDS], insane[ROUNDS];
    uint8_t bytes[SIZE] = {0};
    rings = mmap(NULL, 2 * sizeof *rings, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(rings != MAP_FAILED);
    struct insane_node *node = insane_node_start();
    pid_t echo = start(insane_echo, node);
    pin(0);
    struct ends ends = make_ends(node);
    while (nsn_insane_outcome(ends.insane, ends.source, send_one(&ends, bytes)) == 0)
        sched_yield();
    struct nsn_buffer *first;
    CHECK_EQUAL(nsn_insane_consume(ends.insane, ends.sink, UINT64_MAX, 0, &first), 0);
    nsn_insane_release(ends.insane, first);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < TRIPS; i++) {
            uint64_t begin = nsn_now_ns();
            insane_trip(&ends, bytes);
            times[i] = (uint32_t)(nsn_now_ns() - begin);
        }
        insane[round] = median(times, TRIPS);
        kill(echo, SIGSTOP); /* it polls, and would share its processor with the raw ring's */
        memset(rings, 0, 2 * sizeof *rings);
        pid_t raw_side = start(raw_echo, node);
        uint64_t number = 0;
        for (int i = 0; i < TRIPS; i++) {
            uint64_t begin = nsn_now_ns();
            ring_put(&rings[0], ++number, bytes);
            ring_get(&rings[1], number, bytes);
            times[i] = (uint32_t)(nsn_now_ns() - begin);
        }
        raw[round] = median(times, TRIPS);
        kill(raw_side, SIGKILL);
        waitpid(raw_side, NULL, 0);
        kill(echo, SIGCONT);
    }
    double ours = median(insane, ROUNDS), theirs = median(raw, ROUNDS);
    printf("insane_rtt_64_p50 %.0f ns\nraw_ring_rtt_64_p50 %.0f ns\ninsane_to_raw_ratio %.1f\n", ours, theirs, ours / theirs);
    kill(echo, SIGKILL);
    waitpid(echo, NULL, 0);
    nsn_insane_close(ends.insane, 0);
    insane_node_stop(node);
    return 0;
}
