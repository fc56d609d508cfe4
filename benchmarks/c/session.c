/* Two C programs on one node, polling: round trip of 64 bytes, and what one publish costs with 1 and with 10,000
 * subscriptions of other subjects. */
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>

#include "../../tests/c/node.h"

#define TRIPS 200000
#define PUBLISHES 1000000

static struct nsn_message messages[256];
static uint8_t blob[1 << 16];

static void pin(int processor)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(processor % (int)sysconf(_SC_NPROCESSORS_ONLN), &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void echo(struct node *node)
{
    pin(1);
    struct nsn_session *session = node_session(node);
    node_subscribe(session, 1, "ping", "");
    for (;;) {
        nsn_session_process(session, 0);
        for (int round = 0; round < 1000; round++) {
            int count = nsn_receive(session, messages, 256, blob, sizeof blob, 1000000);
            for (int i = 0; i < count; i++)
                node_publish(session, "pong", blob + messages[i].offset + messages[i].subject_length,
                             messages[i].payload_length);
        }
    }
}

/* Reads all that is published as "load" and nothing else. */
static void sink(struct node *node)
{
    pin(1);
    struct nsn_session *session = node_session(node);
    node_subscribe(session, 1, "load", "");
    for (;;) {
        nsn_session_process(session, 0);
        for (int round = 0; round < 1000; round++)
            nsn_receive(session, messages, 256, blob, sizeof blob, 1000000);
    }
}

static int by_value(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return left < right ? -1 : left > right;
}

static void round_trips(struct nsn_session *session)
{
    static uint32_t times[TRIPS];
    uint8_t payload[64] = {0};
    WAIT_FOR(session, node_publish(session, "ping", payload, sizeof payload) > 0);
    for (int i = -1000; i < TRIPS; i++) {
        uint64_t begin = nsn_now_ns();
        if (i > -1000)
            node_publish(session, "ping", payload, sizeof payload);
        while (nsn_receive(session, messages, 256, blob, sizeof blob, 1000000) == 0)
            nsn_session_process(session, 0);
        if (i >= 0)
            times[i] = (uint32_t)(nsn_now_ns() - begin);
    }
    qsort(times, TRIPS, sizeof *times, by_value);
    printf("round trip, 64 B: p50 %u ns, p99 %u ns\n", times[TRIPS / 2], times[TRIPS / 100 * 99]);
}

static double publish_cost(struct nsn_session *session)
{
    uint8_t payload[64] = {0};
    uint64_t begin = nsn_now_ns(), waited = 0;
    for (int i = 0; i < PUBLISHES; i++)
        if (node_publish(session, "load", payload, sizeof payload) < 0) {
            uint64_t full = nsn_now_ns();
            while (!nsn_space(session))
                nsn_session_process(session, 0);
            waited += nsn_now_ns() - full;
            i--;
        }
    return (double)(nsn_now_ns() - begin - waited) / PUBLISHES;
}

static pid_t start(struct node *node, void (*program)(struct node *))
{
    pid_t pid = fork();
    if (pid == 0)
        program(node);
    return pid;
}

int main(void)
{
    struct node *node = node_start();
    pid_t peers[2] = {start(node, echo), start(node, sink)};
    pin(0);
    struct nsn_session *session = node_session(node);
    node_subscribe(session, 1, "pong", "");
    round_trips(session);
    WAIT_FOR(session, node_publish(session, "load", "", 0) > 0);
    kill(peers[0], SIGKILL);
    double alone = publish_cost(session);
    struct nsn_session *others = node_session(node);
    for (uint32_t i = 0; i < 10000; i++) {
        char subject[32];
        snprintf(subject, sizeof subject, "other.%u", i);
        CHECK_EQUAL(nsn_subscribe(others, i + 1, subject, strlen(subject), "", 0), 0);
    }
    WAIT_FOR(others, nsn_interest_settled(others, 100000));
    double among = publish_cost(session);
    printf("one publish, 64 B, one awake subscriber: %.0f ns; with 10,000 subscriptions of other subjects: %.0f ns\n", alone,
           among);
    kill(peers[1], SIGKILL);
    while (wait(NULL) > 0)
        ;
    nsn_session_close(others);
    nsn_session_close(session);
    node_stop(node);
    return 0;
}
