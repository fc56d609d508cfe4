/* A session that hears a peer which lies, beside one that does not. What the liar does harms its own link alone: the victim
 * ignores it, or counts it and drops that link, and what the good peer says arrives meanwhile. A world that stands still ends
 * the program; however it ends, it says what it was doing. */
#ifndef LIES_WORLD_H
#define LIES_WORLD_H

#include <signal.h>

#include "liar.h"
#include "nsn_session_internal.h"

#define CALL_NS 5000000000ull /* what a call may take on a machine that does much else; it should be microseconds */
#define STUCK_S 60u
#define GOOD_MAGIC 0x600d600d600d600dull

/* --- saying which seed it was ----------------------------------------------------------------------------------------- */

static const char *doing;
static uint64_t doing_seed;

static inline void tell(void)
{
    char words[160];
    if (!doing)
        return;
    int length = snprintf(words, sizeof words, "in %s, NSN_SEED=%llu\n", doing, (unsigned long long)doing_seed);
    if (write(2, words, (size_t)length) < 0)
        _exit(1);
}

static inline void struck(int signal_number)
{
    tell();
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

__attribute__((constructor)) static inline void listen_for_the_end(void)
{
    signal(SIGALRM, struck);
    atexit(tell);
    if (__sanitizer_set_death_callback) {
        __sanitizer_set_death_callback(tell);
        return;
    }
    signal(SIGABRT, struck);
    signal(SIGSEGV, struck);
    signal(SIGBUS, struck);
}

/* --- a victim, a good peer and a liar ----------------------------------------------------------------------------------- */

struct world {
    struct node *node;
    struct nsn_session *victim, *good;
    struct liar liar;
    uint64_t good_sent, good_seen;
    uint64_t forged;              /* messages of the liar that were delivered */
    uint32_t held[64], held_count; /* borrowed large messages */
    void (*meanwhile)(struct world *world); /* before each turn of the victim */
    struct nsn_message messages[256];
    uint8_t blob[1 << 16];
};

static inline void subscribe(struct nsn_session *session, uint32_t sid, const char *pattern, const char *queue)
{
    CHECK_EQUAL(nsn_subscribe(session, sid, pattern, strlen(pattern), queue, strlen(queue)), 0);
}

static inline void new_liar(struct world *world)
{
    liar_hello(&world->liar, world->node);
    liar_subscribe(&world->liar, 1, "l", "");
    liar_subscribe(&world->liar, 2, "l", "w"); /* some of the victim's messages go to it or to the good peer */
    liar_link(&world->liar, world->victim);
}

static inline void open_world(struct world *world, struct node *node)
{
    *world = (struct world){.node = node};
    world->victim = node_session_with(node, (struct nsn_session_options){.name = "victim", .link_limit = 1 << 20,
                                                                         .budget = 64 << 20});
    world->good = node_session(node);
    subscribe(world->victim, 1, "v", "");
    subscribe(world->victim, 2, "v.*", "");
    node_subscribe(world->victim, 3, "q", "g");
    subscribe(world->good, 1, "l", "");
    node_subscribe(world->good, 2, "q", "g");
    subscribe(world->good, 3, "l", "w");
    node_subscribe(world->good, 4, "w", "w");
    new_liar(world);
}

static inline uint64_t link_errors(struct nsn_session *session)
{
    struct nsn_counters counters;
    nsn_session_counters(session, &counters);
    return counters.link_errors;
}

static inline void release_all(struct world *world)
{
    for (uint32_t i = 0; i < world->held_count; i++)
        nsn_large_release(world->victim, world->held[i]);
    world->held_count = 0;
}

static inline uint64_t sum(const uint8_t *bytes, uint64_t length) /* every byte can be read */
{
    volatile uint64_t total = 0;
    for (uint64_t i = 0; i < length; i += 512)
        total += bytes[i];
    return length ? total + bytes[length - 1] : total;
}

static inline void check_message(struct world *world, const struct nsn_message *message)
{
    uint64_t names = (uint64_t)message->offset + message->subject_length + message->reply_length;
    uint64_t inside = (uint64_t)message->header_length + message->payload_length;
    CHECK(message->subject_length >= 1 && message->subject_length <= 4096 && message->reply_length <= 4096);
    CHECK(message->sid >= 1 && message->sid <= 9);
    CHECK(names <= sizeof world->blob);
    if (message->flags & NSN_MESSAGE_LARGE) {
        const uint8_t *data = nsn_large(world->victim, message->large);
        CHECK(data);
        sum(data, inside);
        world->forged++;
        if (world->held_count == 64)
            release_all(world);
        world->held[world->held_count++] = message->large;
        return;
    }
    CHECK(names + inside <= sizeof world->blob);
    uint64_t words[2] = {0};
    if (message->payload_length == sizeof words)
        memcpy(words, world->blob + names + message->header_length, sizeof words);
    if (words[0] == GOOD_MAGIC) {
        CHECK_EQUAL(words[1], world->good_seen + 1);
        world->good_seen++;
    } else {
        world->forged++;
    }
}

#define IN_TIME(call)                                                                                                       \
    do {                                                                                                                    \
        uint64_t call_began = nsn_now_ns();                                                                                 \
        call;                                                                                                               \
        CHECK(nsn_now_ns() - call_began < CALL_NS && #call);                                                                \
    } while (0)

/* Lets the victim process and receive once; returns how many messages came. */
static inline int turn(struct world *world)
{
    int count = 0;
    if (world->meanwhile)
        world->meanwhile(world);
    IN_TIME(nsn_session_process(world->victim, 0));
    IN_TIME(count = nsn_receive(world->victim, world->messages, 256, world->blob, sizeof world->blob, 0));
    CHECK(count >= 0 && count <= 256);
    for (int i = 0; i < count; i++)
        check_message(world, &world->messages[i]);
    return count;
}

/* Reads what the good peer got; returns how many messages. */
static inline int good_reads(struct world *world)
{
    static struct nsn_message messages[256];
    static uint8_t blob[1 << 16];
    nsn_session_process(world->good, 0);
    int count = nsn_receive(world->good, messages, 256, blob, sizeof blob, 0);
    for (int i = 0; i < count; i++)
        if (messages[i].flags & NSN_MESSAGE_LARGE) {
            const uint8_t *data = nsn_large(world->good, messages[i].large);
            for (uint32_t at = 1; at < messages[i].payload_length; at++)
                CHECK(data[at] == data[0]); /* a block that is not free was not written again */
            nsn_large_release(world->good, messages[i].large);
        }
    return count;
}

static inline void good_says(struct world *world, int messages)
{
    for (int i = 0; i < messages; i++) {
        uint64_t words[2] = {GOOD_MAGIC, world->good_sent + 1};
        int result = node_publish(world->good, "v", words, sizeof words);
        if (result == -EAGAIN || result == -EALREADY)
            return;
        CHECK(result >= 1);
        world->good_sent++;
    }
}

/* Whatever the liar does: all that the good peer said comes, within a bounded time. */
static inline void hear_the_good(struct world *world)
{
    uint64_t until = nsn_now_ns() + CALL_NS;
    while (world->good_seen < world->good_sent) {
        turn(world);
        good_reads(world);
        CHECK(nsn_now_ns() < until && "what the good peer said comes");
    }
}

/* flush() of a program: the barrier is done within a bounded time. */
static inline void flush(struct world *world, struct nsn_session *session)
{
    int token = nsn_barrier_begin(session), done = 0;
    uint64_t until = nsn_now_ns() + CALL_NS;
    CHECK(token > 0);
    while (!done) {
        if (session == world->victim)
            turn(world);
        else
            nsn_session_process(session, 0);
        good_reads(world); /* the victim may wait for room to pass something on */
        IN_TIME(done = nsn_barrier_done(session, token));
        CHECK(nsn_now_ns() < until && "a barrier is done");
    }
    CHECK_EQUAL(done, 1);
}

/* The session finds nothing to do within a bounded time, so that it may sleep. */
static inline void falls_asleep(struct world *world)
{
    uint64_t until = nsn_now_ns() + CALL_NS;
    while (!nsn_arm(world->victim)) {
        turn(world);
        good_reads(world);
        CHECK(nsn_now_ns() < until && "the victim finds rest");
    }
    nsn_disarm(world->victim);
}

static inline void close_world(struct world *world, bool heard)
{
    liar_end(&world->liar);
    good_says(world, 3);
    if (heard) {
        hear_the_good(world);
        flush(world, world->victim); /* nothing of the liar is left to wait for once it is gone */
    }
    turn(world);
    release_all(world);
    nsn_session_close(world->victim);
    nsn_session_close(world->good);
}

static inline void with_world(void (*run)(struct world *))
{
    struct node *node = node_start();
    static struct world world;
    alarm(STUCK_S);
    open_world(&world, node);
    run(&world);
    close_world(&world, true);
    alarm(0);
    node_stop(node);
}

static inline int victim_says(struct world *world, const void *payload, size_t length)
{
    int result = -EALREADY;
    for (int i = 0; i < 1000 && result == -EALREADY; i++) {
        IN_TIME(result = node_publish(world->victim, "l", payload, length));
        nsn_session_process(world->victim, 0);
    }
    CHECK(result >= 0 || result == -EAGAIN || result == -ENOBUFS || result == -EALREADY);
    return result;
}

#endif
