/* What costs no system call: the kernel ends this program's child at the first one. */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "inbox.h"

#define MESSAGES 2000

/* From here on the process can only end. */
static void forbid_system_calls(void)
{
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    struct sock_fprog filter = {.len = sizeof rules / sizeof *rules, .filter = rules};
    CHECK_EQUAL(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    CHECK_EQUAL(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter), 0);
}

/* In a child, which may end by its own system call alone: 0, its exit status, or the signal that ended it, negative. */
static int ends_with(void (*program)(struct node *), struct node *node)
{
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        program(node);
        _exit(0);
    }
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

static void read_clock(struct node *node)
{
    (void)node;
    nsn_now_ns();
    forbid_system_calls();
    nsn_now_ns();
}

static void ring_a_bell(struct node *node)
{
    struct nsn_session *a = node_session(node), *b = node_session(node);
    node_subscribe(b, 1, "x", "");
    node_publish(a, "x", "1", 1);
    CHECK_EQUAL(drain_all(b, NULL), 1);
    CHECK_EQUAL(nsn_arm(b), 1);
    forbid_system_calls();
    node_publish(a, "x", "1", 1);
}

static void exchange_messages(struct node *node)
{
    static struct inbox inbox;
    static uint8_t payload[512];
    struct nsn_session *a = node_session(node), *b = node_session(node);
    node_subscribe(b, 1, "x", "");
    node_publish(a, "x", payload, sizeof payload);
    CHECK_EQUAL(drain_all(b, NULL), 1);
    for (int i = 0; i < MESSAGES; i++) { /* so that what grows at first has grown */
        CHECK_EQUAL(node_publish(a, "x", payload, sizeof payload), 1);
        CHECK_EQUAL(nsn_receive(b, inbox.messages, 256, inbox.blob, sizeof inbox.blob, 0), 1);
    }
    forbid_system_calls();
    for (int i = 0; i < MESSAGES; i++)
        if (node_publish(a, "x", payload, sizeof payload) != 1 ||
            nsn_receive(b, inbox.messages, 256, inbox.blob, sizeof inbox.blob, 0) != 1)
            _exit(2);
}

TEST(awake_subscriber_gets_messages_without_a_system_call)
{
    struct node *node = node_start();
    if (ends_with(read_clock, node) == -SIGSYS) {
        printf("not to be seen: on this machine reading the clock is a system call (/sys/devices/system/clocksource)\n");
    } else {
        CHECK_EQUAL(ends_with(exchange_messages, node), 0);
        CHECK_EQUAL(ends_with(ring_a_bell, node), -SIGSYS); /* so that one is seen */
    }
    node_stop(node);
}

CHECK_MAIN()
