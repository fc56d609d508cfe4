/* libnsn's sessions and a node on the simulated machine, in small rounds of which each must come out right:
 *
 *     stress SCENARIO ROUNDS [FIRST-SEED]
 *
 * Says "round SEED: what went wrong" and ends with 1 at the first that does not. A scenario's sessions live for many rounds,
 * and are made anew now and then: what happens while links are made is part of it. */
#include <inttypes.h>

#include "node.h"
#include "nsn_session_internal.h"
#include "simulator.h"

#define SESSIONS 3
#define MESSAGES 512
#define BLOB (1u << 20)
#define TRIES 20000
#define PAYLOAD_MAX 8000

struct side {
    struct nsn_session *session;
    uint32_t sent, reached, got, expected;
    uint32_t sid;                  /* of this round */
};

struct scenario {
    const char *name;
    unsigned sessions, rounds_each; /* before the sessions are made anew */
    struct nsn_session_options options;
    void (*prepare)(struct side *sides);
    void (*run[SESSIONS])(void *side);
    void (*check)(struct side *sides);
};

static struct side sides[SESSIONS];
static unsigned side_count;
static struct node *node;
static uint64_t seed;

static void fail(const char *what, uint64_t a, uint64_t b)
{
    char command[128]; /* nothing else can be put in order: the tasks are in the middle of something */
    snprintf(command, sizeof command, "rm -rf '%s'", node->directory);
    if (system(command) != 0)
        printf("%s is left\n", node->directory);
    printf("round %" PRIu64 ": %s (%" PRIu64 ", %" PRIu64 ")\n", seed, what, a, b);
    exit(1);
}

/* --- what tasks do -------------------------------------------------------------------------------------------------------- */

static bool is_rung(void *context)
{
    struct side *side = context;
    struct pollfd fds[2] = {{nsn_session_bell_fd(side->session), POLLIN, 0},
                            {nsn_session_control_fd(side->session), POLLIN, 0}};
    return poll(fds, 2, 0) > 0;
}

static void woken(struct side *side)
{
    nsn_disarm(side->session);
    nsn_session_process(side->session, 0);
}

static void publish(struct side *side, const char *subject, uint64_t number, size_t length)
{
    uint8_t payload[PAYLOAD_MAX];
    memset(payload, (int)(number % 251), length);
    memcpy(payload, &number, sizeof number);
    for (int tries = 0; tries < TRIES; tries++) {
        int result = node_publish(side->session, subject, payload, length);
        if (result >= 0) {
            side->sent++;
            side->reached += (uint32_t)result;
            return;
        }
        if (result == -EALREADY)
            nsn_session_process(side->session, 0);
        else if (result != -EAGAIN)
            fail(nsn_session_error(side->session), (uint64_t)-result, number);
        else {
            sim_wait(is_rung, side);
            woken(side);
        }
    }
    fail("a publish comes to no end", number, 0);
}

static uint64_t number_of(const struct nsn_message *message, const uint8_t *blob)
{
    uint64_t number;
    const uint8_t *at = blob + message->offset + message->subject_length;
    memcpy(&number, at, sizeof number);
    for (uint32_t i = sizeof number; i < message->payload_length; i++)
        if (at[i] != number % 251)
            fail("a message is damaged", number, i);
    return number;
}

/* One look. Returns how many messages there were; numbers[]: theirs. */
static int receive(struct side *side, uint64_t *numbers)
{
    static struct nsn_message messages[SESSIONS][MESSAGES];
    static uint8_t blobs[SESSIONS][BLOB];
    size_t self = (size_t)(side - sides);
    int count = nsn_receive(side->session, messages[self], MESSAGES, blobs[self], BLOB, 0);
    for (int i = 0; i < count; i++)
        numbers[i] = number_of(&messages[self][i], blobs[self]);
    struct nsn_event event;
    while (nsn_next_event(side->session, &event))
        if (event.kind == NSN_EVENT_LINK_BROKEN)
            fail(event.text, event.slot, 0);
    side->got += (uint32_t)count;
    return count;
}

/* Until it has been written to; as a program that has nothing to do waits. */
static void sleep_once(struct side *side)
{
    if (nsn_arm(side->session)) {
        sim_wait(is_rung, side);
        woken(side);
    }
}

static bool node_has_work(void *context)
{
    (void)context;
    struct pollfd fds[NODE_SESSIONS + 1] = {{node->listener, POLLIN, 0}};
    for (int i = 0; i < NODE_SESSIONS; i++)
        fds[i + 1] = (struct pollfd){node->sessions[i].fd, POLLIN, 0};
    return poll(fds, NODE_SESSIONS + 1, 0) > 0;
}

static void serve(void *context)
{
    do
        node_step(node, 0);
    while (sim_wait(node_has_work, context));
}

/* --- scenarios ------------------------------------------------------------------------------------------------------------ */

static void subscribe(struct side *side, const char *subject)
{
    CHECK_EQUAL(nsn_subscribe(side->session, 1, subject, strlen(subject), "", 0), 0);
}

/* wake: two publish to one who sleeps whenever there is nothing. space: the same, and each message fills the link. */
static void prepare_wake(struct side *those) { subscribe(&those[2], "s"); }

static void publish_some(void *context)
{
    struct side *side = context;
    for (unsigned i = 0; i < 2; i++)
        publish(side, "s", side->sent, 64);
}

static void receive_all(void *context)
{
    struct side *side = context;
    uint64_t numbers[MESSAGES];
    for (side->expected += 4; side->got < side->expected;)
        if (!receive(side, numbers))
            sleep_once(side);
}

static void check_wake(struct side *those)
{
    if (those[2].got != those[0].sent + those[1].sent)
        fail("messages were doubled", those[0].sent + those[1].sent, those[2].got);
}

/* quiescence: a subscription is drained while two publish. When the barrier is done, all that reached it has come. */
static void publish_while(void *context)
{
    struct side *side = context;
    for (uint32_t i = 1 + sim_random(4); i > 0; i--)
        publish(side, "s", side->sent, 64);
}

static void subscribe_and_drain(void *context)
{
    struct side *side = context;
    uint64_t numbers[MESSAGES];
    CHECK_EQUAL(nsn_subscribe(side->session, ++side->sid, "s", 1, "", 0), 0);
    while (!nsn_interest_settled(side->session, 1000))
        nsn_session_process(side->session, 0);
    for (uint32_t i = sim_random(8); i > 0; i--)
        receive(side, numbers);
    CHECK_EQUAL(nsn_drain(side->session, side->sid), 0);
    int token = nsn_barrier_begin(side->session);
    for (int tries = 0; !nsn_barrier_done(side->session, token); tries++) {
        if (tries == TRIES)
            fail("a barrier comes to no end", 0, 0);
        receive(side, numbers);
        nsn_session_process(side->session, 0);
    }
    nsn_unsubscribe(side->session, side->sid, 0);
}

static void check_quiescence(struct side *those)
{
    if (those[0].reached + those[1].reached != those[2].got)
        fail("published to it and received by the end of the barrier", those[0].reached + those[1].reached, those[2].got);
}

/* causality: the second answers each message of the first, and the third hears both. */
static bool caused[1 << 12];

static void prepare_causality(struct side *those)
{
    memset(caused, 0, sizeof caused);
    subscribe(&those[1], "a");
    subscribe(&those[2], "*");
}

static void cause(void *context)
{
    struct side *side = context;
    for (unsigned i = 0; i < 2; i++)
        publish(side, "a", 2 * side->sent, 64);
}

static void effect(void *context)
{
    struct side *side = context;
    uint64_t numbers[MESSAGES];
    for (side->expected += 2; side->got < side->expected;) {
        int count = receive(side, numbers);
        for (int i = 0; i < count; i++)
            publish(side, "b", numbers[i] + 1, 64);
        if (!count)
            sleep_once(side);
    }
}

static void judge(void *context)
{
    struct side *side = context;
    uint64_t numbers[MESSAGES];
    for (side->expected += 4; side->got < side->expected;) {
        int count = receive(side, numbers);
        for (int i = 0; i < count; i++) {
            uint64_t number = numbers[i];
            CHECK(number < sizeof caused);
            if (number % 2 && !caused[number - 1])
                fail("an effect came before its cause", number, 0);
            caused[number] = true;
        }
        if (!count)
            sleep_once(side);
    }
}

static void check_nothing(struct side *those) { (void)those; }

/* trim: memory is given back while the next messages are written. */
static void publish_a_chunk(void *context)
{
    struct side *side = context;
    for (unsigned i = 0; i < 9; i++)
        publish(side, "s", side->sent, PAYLOAD_MAX);
}

static void receive_and_trim(void *context)
{
    struct side *side = context;
    uint64_t numbers[MESSAGES];
    for (side->expected += 9; side->got < side->expected;) {
        nsn_trim(side->session);
        if (!receive(side, numbers))
            sleep_once(side);
    }
}

/* stall: a publisher gives up at once, a consumer answers; each message is received, or dropped and known to be. */
static void publish_and_give_up(void *context)
{
    struct side *side = context;
    uint8_t payload[64] = {0};
    for (uint32_t i = 2 + sim_random(4); i > 0;) {
        int result = node_publish(side->session, "s", payload, sizeof payload);
        if (result == -EAGAIN) {
            nsn_publish_give_up(side->session);
        } else {
            CHECK_EQUAL(result, 1);
            side->sent++;
            i--;
        }
    }
}

/* To the end of the round, which does not wake it. */
static void receive_what_there_is(void *context)
{
    struct side *side = context;
    uint64_t numbers[MESSAGES];
    for (;;) {
        if (receive(side, numbers) || !nsn_arm(side->session))
            continue;
        if (!sim_wait(is_rung, side) && !is_rung(side))
            return;
        woken(side);
    }
}

static void check_stall(struct side *those)
{
    uint64_t discarded = those[2].session->counters.discarded;
    if (those[2].got + discarded != those[0].sent)
        fail("published, and received or known to be dropped", those[0].sent, those[2].got + discarded);
}

/* queue: of two members of a queue group one leaves while messages come; each message is received once, by one or the other. */
static void prepare_queue(struct side *those)
{
    CHECK_EQUAL(nsn_subscribe(those[2].session, 1, "s", 1, "q", 1), 0);
}

static void join_and_leave(void *context)
{
    struct side *side = context;
    uint64_t numbers[MESSAGES];
    CHECK_EQUAL(nsn_subscribe(side->session, ++side->sid, "s", 1, "q", 1), 0);
    while (!nsn_interest_settled(side->session, 1000))
        nsn_session_process(side->session, 0);
    for (uint32_t i = sim_random(8); i > 0; i--)
        receive(side, numbers);
    CHECK_EQUAL(nsn_unsubscribe(side->session, side->sid, 0), 0);
    for (int ghosts = 1, tries = 0; ghosts; tries++) {
        if (tries == TRIES)
            fail("what has left a queue group is never forgotten", 0, 0);
        receive(side, numbers);
        nsn_session_process(side->session, 0);
        ghosts = (int)side->session->subscriptions.ghosts || side->session->passing;
    }
}

static void check_queue(struct side *those)
{
    if (those[0].reached != those[1].got + those[2].got)
        fail("published to the group, and received by its members", those[0].reached, those[1].got + those[2].got);
}

static const struct scenario scenarios[] = {
    {"wake", 3, 500, {0}, prepare_wake, {publish_some, publish_some, receive_all}, check_wake},
    {"space", 3, 500, {.link_limit = 8}, prepare_wake, {publish_some, publish_some, receive_all}, check_wake},
    {"quiescence", 3, 20, {0}, NULL, {publish_while, publish_while, subscribe_and_drain}, check_quiescence},
    {"causality", 3, 50, {0}, prepare_causality, {cause, effect, judge}, check_nothing},
    {"trim", 3, 200, {0}, prepare_wake, {publish_a_chunk, NULL, receive_and_trim}, check_wake},
    {"queue", 3, 20, {0}, prepare_queue, {publish_while, join_and_leave, receive_what_there_is}, check_queue},
    {"stall", 3, 200, {.link_limit = 8}, prepare_wake, {publish_and_give_up, NULL, receive_what_there_is}, check_stall},
};

/* --- rounds --------------------------------------------------------------------------------------------------------------- */

static void settle(void)
{
    for (int i = 0; i < 20; i++) {
        node_step(node, 0);
        for (unsigned side = 0; side < side_count; side++)
            nsn_session_process(sides[side].session, 0);
    }
}

static void open_all(const struct scenario *scenario)
{
    node = node_open();
    memset(sides, 0, sizeof sides);
    side_count = scenario->sessions;
    for (unsigned i = 0; i < side_count; i++) {
        char error[256] = "";
        struct nsn_session_options options = scenario->options;
        options.socket_path = node->socket_path;
        options.application_id = 4222;
        options.name = "";
        sides[i].session = nsn_session_open(&options, error, sizeof error);
        CHECK(sides[i].session);
        while (nsn_session_state(sides[i].session) == NSN_CONNECTING) {
            node_step(node, 0);
            nsn_session_process(sides[i].session, 0);
        }
        CHECK_EQUAL(nsn_session_state(sides[i].session), NSN_READY);
    }
    if (scenario->prepare)
        scenario->prepare(sides);
    settle();
}

static void close_all(void)
{
    for (unsigned i = 0; i < side_count; i++)
        nsn_session_close(sides[i].session);
    node_close(node);
}

static void run(const struct scenario *scenario, uint64_t first, uint64_t rounds)
{
    for (seed = first; seed < first + rounds; seed++) {
        if ((seed - first) % scenario->rounds_each == 0) {
            if (seed > first)
                close_all();
            open_all(scenario);
        }
        struct sim_task tasks[SESSIONS + 1] = {{serve, NULL, 2}};
        unsigned count = 1;
        for (unsigned i = 0; i < side_count; i++)
            if (scenario->run[i])
                tasks[count++] = (struct sim_task){scenario->run[i], &sides[i], scenario->run[i] == receive_what_there_is};
        if (!sim_run(tasks, count, seed))
            fail("a wake-up was lost: received, of", sides[2].got, sides[2].expected);
        settle();
        scenario->check(sides);
    }
    close_all();
}

int main(int count, char **words)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t i = 0; count >= 3 && i < sizeof scenarios / sizeof scenarios[0]; i++)
        if (strcmp(words[1], scenarios[i].name) == 0) {
            run(&scenarios[i], count > 3 ? strtoull(words[3], NULL, 10) : 1, strtoull(words[2], NULL, 10));
            return 0;
        }
    fprintf(stderr, "stress SCENARIO ROUNDS [FIRST-SEED]\n");
    return 2;
}
