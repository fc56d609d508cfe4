/* What a session of a test has received. */
#ifndef TESTS_INBOX_H
#define TESTS_INBOX_H

#include "node.h"

struct inbox {
    struct nsn_message messages[256];
    uint8_t blob[1 << 17];
};

/* Attends to nsnd, and takes what is there. How many. */
static int receive(struct nsn_session *session, struct inbox *inbox)
{
    nsn_session_process(session, 0);
    int count = nsn_receive(session, inbox->messages, 256, inbox->blob, sizeof inbox->blob, 0);
    CHECK(count >= 0);
    return count;
}

/* Receives until nothing has come behind a barrier; returns how many, and of each sid (0..7). */
static inline int drain_all(struct nsn_session *session, int counts[8])
{
    static _Thread_local struct inbox inbox;
    int total = 0, token = nsn_barrier_begin(session);
    uint64_t until = nsn_now_ns() + 10000000000ull;
    CHECK(token > 0);
    for (;;) {
        int count = receive(session, &inbox);
        for (int i = 0; i < count; i++) {
            total++;
            if (counts)
                counts[inbox.messages[i].sid & 7]++;
            if (inbox.messages[i].flags & NSN_MESSAGE_LARGE)
                nsn_large_release(session, inbox.messages[i].large);
        }
        if (!count && nsn_barrier_done(session, token) == 1)
            return total;
        CHECK(nsn_now_ns() < until);
    }
}

#endif
