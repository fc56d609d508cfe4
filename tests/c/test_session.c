/* Sessions on one node: publish, receive, queue groups, maxima, barriers, back-pressure, causality. */
#include "inbox.h"

TEST(message_reaches_subscriber_with_all_its_parts)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node);
    static struct inbox inbox;
    node_subscribe(b, 7, "orders.*", "");
    CHECK_EQUAL(nsn_publish(a, "orders.new", 10, "reply.to", 8, (const uint8_t *)"NATS/1.0\r\n\r\n", 12,
                            (const uint8_t *)"hello", 5), 1);
    int count;
    WAIT_FOR(b, (count = receive(b, &inbox)) > 0);
    CHECK_EQUAL(count, 1);
    struct nsn_message *message = &inbox.messages[0];
    CHECK_EQUAL(message->sid, 7);
    CHECK_EQUAL(message->subject_length, 10);
    CHECK_EQUAL(memcmp(inbox.blob + message->offset, "orders.newreply.toNATS/1.0\r\n\r\nhello", 35), 0);
    CHECK_EQUAL(node_publish(a, "orders", "x", 1), 0);
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(own_subscription_gets_own_message_unless_no_echo)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node);
    struct nsn_session *b = node_session_with(node, (struct nsn_session_options){.name = "quiet", .no_echo = 1});
    node_subscribe(a, 1, "x", "");
    CHECK_EQUAL(node_publish(a, "x", "1", 1), 1);
    CHECK_EQUAL(drain_all(a, NULL), 1);
    node_subscribe(b, 1, "y", "");
    CHECK_EQUAL(node_publish(b, "y", "1", 1), 0);
    CHECK_EQUAL(drain_all(b, NULL), 0);
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(overlapping_subscriptions_each_get_a_message)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node);
    int counts[8] = {0};
    node_subscribe(b, 1, "a.b", "");
    node_subscribe(b, 2, "a.*", "");
    node_subscribe(b, 3, ">", "");
    CHECK_EQUAL(node_publish(a, "a.b", "1", 1), 3);
    CHECK_EQUAL(node_publish(a, "a.c", "1", 1), 2);
    CHECK_EQUAL(drain_all(b, counts), 5);
    CHECK_EQUAL(counts[1], 1);
    CHECK_EQUAL(counts[3], 2);
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(large_payload_is_read_in_place_and_its_block_comes_back)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node);
    static struct inbox inbox;
    size_t size = 1 << 20;
    uint8_t *payload = malloc(size);
    node_subscribe(b, 1, "big", "");
    for (int round = 0; round < 200; round++) {
        memset(payload, round, size);
        CHECK_EQUAL(node_publish(a, "big", payload, size), 1);
        int count;
        WAIT_FOR(b, (count = receive(b, &inbox)) > 0);
        CHECK_EQUAL(count, 1);
        CHECK(inbox.messages[0].flags & NSN_MESSAGE_LARGE);
        CHECK_EQUAL(inbox.messages[0].payload_length, size);
        const uint8_t *data = nsn_large(b, inbox.messages[0].large);
        CHECK(data && data[0] == (uint8_t)round && data[size - 1] == (uint8_t)round);
        nsn_large_release(b, inbox.messages[0].large);
    }
    struct nsn_counters counters;
    nsn_publish(a, "nobody", 6, "", 0, NULL, 0, NULL, 0);
    nsn_trim(a);
    nsn_session_counters(a, &counters);
    CHECK(counters.pool_bytes < 16 << 20);
    free(payload);
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(queue_group_gives_each_message_to_one_member)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node), *c = node_session(node);
    node_subscribe(b, 1, "q.*", "workers");
    node_subscribe(b, 2, "q.>", "workers");
    node_subscribe(c, 3, "q.a", "workers");
    node_subscribe(c, 4, "q.a", "");
    int counts[8] = {0};
    for (int i = 0; i < 3000; i++)
        CHECK_EQUAL(node_publish(a, "q.a", "1", 1), 2);
    drain_all(b, counts);
    drain_all(c, counts);
    CHECK_EQUAL(counts[1] + counts[2] + counts[3], 3000);
    CHECK_EQUAL(counts[4], 3000);
    CHECK(counts[1] > 700 && counts[2] > 700 && counts[3] > 700);
    nsn_session_close(a);
    nsn_session_close(b);
    nsn_session_close(c);
    node_stop(node);
}

TEST(maximum_is_exact_and_the_rest_goes_to_the_other_member)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node), *c = node_session(node);
    node_subscribe(b, 1, "q", "g");
    node_subscribe(c, 2, "q", "g");
    CHECK_EQUAL(nsn_unsubscribe(b, 1, 2), 0);
    for (int i = 0; i < 20; i++)
        CHECK_EQUAL(node_publish(a, "q", "1", 1), 1);
    int counts[8] = {0};
    drain_all(b, counts);
    drain_all(c, counts);
    drain_all(b, counts);
    drain_all(c, counts);
    CHECK_EQUAL(counts[1], 2);
    CHECK_EQUAL(counts[2], 18);
    nsn_session_close(a);
    nsn_session_close(b);
    nsn_session_close(c);
    node_stop(node);
}

TEST(no_echo_holds_for_what_is_passed_on_and_for_own_messages_alone)
{
    struct node *node = node_start();
    const struct nsn_session_options quiet = {.name = "quiet", .no_echo = 1};
    struct nsn_session *a = node_session_with(node, quiet), *b = node_session_with(node, quiet), *c = node_session(node);
    node_subscribe(a, 1, "q", "g");
    node_subscribe(b, 2, "q", "g");
    CHECK_EQUAL(nsn_unsubscribe(b, 2, 5), 0);
    for (int i = 0; i < 300; i++)
        CHECK_EQUAL(node_publish(a, "q", "1", 1), 1); /* all of them to b, which may have 5 */
    node_subscribe(c, 3, "q", "g");
    node_subscribe(b, 4, "q", "g");
    int counts[8] = {0};
    for (int i = 0; i < 2; i++) {
        drain_all(b, counts);
        drain_all(c, counts);
        drain_all(a, counts);
    }
    CHECK_EQUAL(counts[1], 0);
    CHECK_EQUAL(counts[2], 5);
    CHECK_EQUAL(counts[3] + counts[4], 295);
    CHECK(counts[4] > 0); /* by chance a quarter: it is no echo, but another's message */
    nsn_session_close(a);
    nsn_session_close(b);
    nsn_session_close(c);
    node_stop(node);
}

TEST(full_link_makes_publisher_wait_and_then_give_up)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session_with(node, (struct nsn_session_options){.name = "a", .link_limit = 1 << 20});
    struct nsn_session *b = node_session(node), *c = node_session(node);
    static uint8_t payload[4096];
    node_subscribe(b, 1, "x", "");
    node_subscribe(c, 2, "x", "");
    int sent = 0, result, received = 0;
    while ((result = node_publish(a, "x", payload, sizeof payload)) == 2) {
        sent++;
        received += drain_all(c, NULL);
    }
    CHECK_EQUAL(result, -EAGAIN);
    CHECK(sent > 200 && sent < 300);
    CHECK_EQUAL(received, sent);
    CHECK_EQUAL(nsn_space(a), 0);
    CHECK_EQUAL(nsn_publish_give_up(a), 1);
    for (int i = 0; i < 10; i++)
        CHECK_EQUAL(node_publish(a, "x", payload, sizeof payload), 2);
    CHECK_EQUAL(drain_all(c, NULL), 10);
    CHECK_EQUAL(drain_all(b, NULL), 0);
    struct nsn_event event;
    CHECK_EQUAL(nsn_next_event(b, &event), 1);
    CHECK_EQUAL(event.kind, NSN_EVENT_SLOW_CONSUMER);
    CHECK_EQUAL(event.number, sent + 10);
    CHECK_EQUAL(node_publish(a, "x", payload, sizeof payload), 2);
    CHECK_EQUAL(drain_all(b, NULL), 1);
    struct nsn_counters counters;
    nsn_session_counters(a, &counters);
    CHECK_EQUAL(counters.dropped, 10);
    nsn_session_counters(b, &counters);
    CHECK_EQUAL(counters.discarded, sent + 10);
    nsn_session_close(a);
    nsn_session_close(b);
    nsn_session_close(c);
    node_stop(node);
}

TEST(reading_makes_space_for_a_waiting_publisher)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session_with(node, (struct nsn_session_options){.name = "a", .link_limit = 1 << 20});
    struct nsn_session *b = node_session(node);
    static uint8_t payload[4096];
    node_subscribe(b, 1, "x", "");
    int sent = 0;
    while (node_publish(a, "x", payload, sizeof payload) == 1)
        sent++;
    CHECK_EQUAL(nsn_space(a), 0);
    nsn_disarm(a);
    CHECK_EQUAL(nsn_arm(a), 1);
    CHECK_EQUAL(drain_all(b, NULL), sent);
    struct pollfd bell = {nsn_session_bell_fd(a), POLLIN, 0};
    CHECK_EQUAL(poll(&bell, 1, 1000), 1);
    CHECK_EQUAL(nsn_space(a), 1);
    CHECK_EQUAL(node_publish(a, "x", payload, sizeof payload), 1);
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(sleeper_is_rung_once)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node);
    node_subscribe(b, 1, "x", "");
    node_publish(a, "x", "1", 1);
    CHECK_EQUAL(drain_all(b, NULL), 1);
    CHECK_EQUAL(nsn_arm(b), 1);
    for (int i = 0; i < 5; i++)
        node_publish(a, "x", "1", 1);
    struct nsn_counters counters;
    nsn_session_counters(a, &counters);
    CHECK_EQUAL(counters.bells, 1);
    struct pollfd bell = {nsn_session_bell_fd(b), POLLIN, 0};
    CHECK_EQUAL(poll(&bell, 1, 1000), 1);
    nsn_disarm(b);
    CHECK_EQUAL(drain_all(b, NULL), 5);
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(dead_publishers_messages_still_arrive)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node);
    static uint8_t payload[100000];
    node_subscribe(b, 1, "x", "");
    node_publish(a, "x", "1", 1);
    node_publish(a, "x", payload, sizeof payload);
    nsn_session_close(a);
    CHECK_EQUAL(drain_all(b, NULL), 2);
    struct nsn_counters counters;
    int left;
    WAIT_FOR(b, (drain_all(b, NULL), nsn_session_counters(b, &counters), left = (int)counters.links_in) == 0);
    nsn_session_close(b);
    node_stop(node);
}

TEST(unread_queue_messages_of_an_ended_member_go_to_another)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node), *c = node_session(node);
    static uint8_t payload[100000];
    node_subscribe(b, 1, "q", "g");
    for (int i = 0; i < 50; i++)
        CHECK_EQUAL(node_publish(a, "q", payload, i % 2 ? 10 : sizeof payload), 1);
    node_subscribe(c, 2, "q", "g");
    nsn_session_close(b);
    struct nsn_counters counters;
    WAIT_FOR(a, (nsn_session_counters(a, &counters), counters.passed_on) == 50);
    CHECK_EQUAL(drain_all(c, NULL), 50);
    nsn_session_close(a);
    nsn_session_close(c);
    node_stop(node);
}

/* --- threads ------------------------------------------------------------------------------------------------------------- */

struct worker {
    struct node *node;
    struct nsn_session *session;
    int messages;
    bool ready, stop;
};

static void publish_or_wait(struct nsn_session *session, const char *subject, const void *payload, size_t length)
{
    uint64_t until = nsn_now_ns() + 20000000000ull;
    int result;
    while ((result = node_publish(session, subject, payload, length)) < 0) {
        CHECK(result == -EAGAIN || result == -EALREADY);
        CHECK(nsn_now_ns() < until);
        nsn_session_process(session, 0);
        nsn_space(session);
    }
}

static void *publisher(void *context)
{
    struct worker *worker = context;
    uint8_t payload[64] = {0};
    for (uint32_t i = 0; i < (uint32_t)worker->messages; i++) {
        memcpy(payload, &i, sizeof i);
        publish_or_wait(worker->session, i % 2 ? "load.a" : "load.b", payload, sizeof payload);
    }
    return NULL;
}

TEST(order_is_kept_and_nothing_lost_under_load)
{
    struct node *node = node_start();
    struct worker workers[2];
    pthread_t threads[2];
    struct nsn_session *b = node_session(node);
    static struct inbox inbox;
    int messages = 100000;
    node_subscribe(b, 1, "load.>", "");
    for (int i = 0; i < 2; i++) {
        workers[i] = (struct worker){.node = node, .session = node_session(node), .messages = messages};
        pthread_create(&threads[i], NULL, publisher, &workers[i]);
    }
    int total = 0;
    uint64_t until = nsn_now_ns() + 60000000000ull;
    uint32_t sum = 0;
    while (total < 2 * messages) {
        int count = receive(b, &inbox);
        for (int i = 0; i < count; i++) {
            uint32_t number;
            memcpy(&number, inbox.blob + inbox.messages[i].offset + inbox.messages[i].subject_length, 4);
            sum += number;
        }
        total += count;
        CHECK(nsn_now_ns() < until);
    }
    CHECK_EQUAL(sum, (uint32_t)((uint64_t)messages * (messages - 1)));
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        nsn_session_close(workers[i].session);
    }
    nsn_session_close(b);
    node_stop(node);
}

/* Relays every cause as an effect as soon as it sees it. */
static void *relay(void *context)
{
    struct worker *worker = context;
    static struct inbox inbox;
    int relayed = 0;
    while (relayed < worker->messages && !__atomic_load_n(&worker->stop, __ATOMIC_RELAXED)) {
        int count = receive(worker->session, &inbox);
        for (int i = 0; i < count; i++) {
            const uint8_t *payload = inbox.blob + inbox.messages[i].offset + inbox.messages[i].subject_length;
            publish_or_wait(worker->session, "effect", payload, 4);
            relayed++;
        }
    }
    return NULL;
}

static void *causes(void *context)
{
    struct worker *worker = context;
    for (uint32_t i = 0; i < (uint32_t)worker->messages; i++)
        publish_or_wait(worker->session, "cause", &i, sizeof i);
    return NULL;
}

TEST(effect_never_comes_before_its_cause)
{
    struct node *node = node_start();
    int messages = 20000;
    struct worker source = {.session = node_session(node), .messages = messages};
    struct worker middle = {.session = node_session(node), .messages = messages};
    struct nsn_session *observer = node_session(node);
    static struct inbox inbox;
    pthread_t threads[2];
    node_subscribe(middle.session, 1, "cause", "");
    node_subscribe(observer, 1, "cause", "");
    node_subscribe(observer, 2, "effect", "");
    pthread_create(&threads[0], NULL, relay, &middle);
    pthread_create(&threads[1], NULL, causes, &source);
    int seen_causes = 0, seen_effects = 0;
    uint64_t until = nsn_now_ns() + 60000000000ull;
    while (seen_effects < messages) {
        int count = receive(observer, &inbox);
        for (int i = 0; i < count; i++)
            if (inbox.messages[i].sid == 1) {
                seen_causes++;
            } else {
                seen_effects++;
                CHECK(seen_effects <= seen_causes);
            }
        CHECK(nsn_now_ns() < until);
    }
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    nsn_session_close(source.session);
    nsn_session_close(middle.session);
    nsn_session_close(observer);
    node_stop(node);
}

static void *endless(void *context)
{
    struct worker *worker = context;
    uint32_t i = 0;
    while (!__atomic_load_n(&worker->stop, __ATOMIC_RELAXED)) {
        publish_or_wait(worker->session, "roll", &i, sizeof i);
        i++;
        __atomic_store_n(&worker->messages, (int)i, __ATOMIC_RELAXED);
    }
    return NULL;
}

TEST(rolling_drains_in_a_queue_group_lose_nothing)
{
    struct node *node = node_start();
    struct worker source = {.session = node_session(node)};
    struct nsn_session *b = node_session(node), *c = node_session(node);
    pthread_t thread;
    int total = 0;
    node_subscribe(c, 1, "roll", "g");
    pthread_create(&thread, NULL, endless, &source);
    for (uint32_t round = 0; round < 60; round++) {
        node_subscribe(b, 10 + round, "roll", "g");
        total += drain_all(c, NULL);
        nsn_drain(b, 10 + round);
        total += drain_all(b, NULL);
        nsn_unsubscribe(b, 10 + round, 0);
        total += drain_all(c, NULL);
    }
    __atomic_store_n(&source.stop, true, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    total += drain_all(b, NULL);
    total += drain_all(c, NULL);
    CHECK_EQUAL(total, source.messages);
    nsn_session_close(source.session);
    nsn_session_close(b);
    nsn_session_close(c);
    node_stop(node);
}

/* What the node's directory says of its table; empty bytes read it, others write it. */
static void where_is_the_table(struct node *node, char text[128], bool write_it)
{
    char path[128];
    snprintf(path, sizeof path, "%s/slots", node->directory);
    FILE *file = fopen(path, write_it ? "w" : "r");
    CHECK(file);
    if (write_it)
        CHECK(fputs(text, file) >= 0);
    else
        CHECK(fgets(text, 128, file));
    fclose(file);
}

static void goes_and_comes_back(struct node *node, struct nsn_session *session, enum nsn_session_state state)
{
    if (nsn_session_control_fd(session) >= 0)
        shutdown(nsn_session_control_fd(session), SHUT_RDWR);
    WAIT_FOR(session, nsn_session_state(session) == NSN_DETACHED);
    CHECK_EQUAL(nsn_session_reattach(session, node->socket_path), 0);
    WAIT_FOR(session, nsn_session_state(session) != NSN_CONNECTING);
    CHECK_EQUAL(nsn_session_state(session), state);
}

TEST(a_node_that_ends_while_a_session_is_let_in_is_not_a_refusal_and_what_was_lost_is_said_later)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node);
    char right[128], gone[128];
    where_is_the_table(node, right, false);
    snprintf(gone, sizeof gone, "insane_nats slots %d segment %d token %032x\n", NSN_SLOTS_VERSION, INT32_MAX, 1);
    node_subscribe(a, 1, "x", "");
    where_is_the_table(node, gone, true);
    goes_and_comes_back(node, a, NSN_DETACHED);
    CHECK(strstr(nsn_session_error(a), "is not there"));
    where_is_the_table(node, right, true);
    goes_and_comes_back(node, a, NSN_LOST);
    CHECK_EQUAL(nsn_session_accept_loss(a), 0);
    node_subscribe(a, 1, "x", "");
    CHECK_EQUAL(node_publish(b, "x", "1", 1), 1);
    goes_and_comes_back(node, b, NSN_LOST); /* and that of another time is forgotten */
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(a_session_that_starts_over_leaves_borrowed_memory_alone)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node);
    static struct nsn_message messages[256];
    static uint8_t blob[1 << 16], payload[20000];
    struct nsn_buffer_out own;
    int count = 0;
    node_subscribe(b, 1, "x", "");
    memset(payload, 7, sizeof payload);
    CHECK_EQUAL(node_publish(a, "x", payload, sizeof payload), 1);
    WAIT_FOR(b, (count = nsn_receive(b, messages, 256, blob, sizeof blob, 0)) == 1);
    uint32_t borrowed = messages[0].large;
    CHECK_EQUAL(nsn_buffer_take(a, sizeof payload, &own), 0);
    memset(own.data, 9, sizeof payload);
    shutdown(nsn_session_control_fd(a), SHUT_RDWR); /* for this node it has ended, and is a new one when it comes back */
    while (nsn_session_state(a) != NSN_DETACHED)
        nsn_session_process(a, 0);
    CHECK_EQUAL(nsn_session_reattach(a, node->socket_path), 0);
    WAIT_FOR(a, nsn_session_state(a) == NSN_LOST);
    CHECK_EQUAL(nsn_session_accept_loss(a), 0);
    memset(payload, 8, sizeof payload);
    for (int i = 0; i < 200; i++) {
        CHECK_EQUAL(node_publish(a, "x", payload, sizeof payload), 1);
        WAIT_FOR(b, (count = nsn_receive(b, messages, 256, blob, sizeof blob, 0)) == 1);
        CHECK_EQUAL(nsn_large(b, messages[0].large)[sizeof payload - 1], 8);
        nsn_large_release(b, messages[0].large);
    }
    for (size_t i = 0; i < sizeof payload; i++)
        CHECK_EQUAL(nsn_large(b, borrowed)[i], 7);
    CHECK_EQUAL(nsn_publish_buffer(a, "x", 1, "", 0, &own, sizeof payload), 1);
    WAIT_FOR(b, (count = nsn_receive(b, messages, 256, blob, sizeof blob, 0)) == 1);
    CHECK_EQUAL(nsn_large(b, messages[0].large)[sizeof payload - 1], 9);
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(who_holds_a_barrier_up_by_a_publish_without_end_is_named)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *b = node_session(node);
    struct nsn_session_info info;
    struct nsn_counters counters;
    struct nsn_event event;
    char pid[32];
    nsn_session_info(b, &info);
    uint64_t *publishing = &nsn_slots_place(node->slots, info.slot)->page.publishing;
    nsn_store_release(publishing, nsn_now_ns());
    int token = nsn_barrier_begin(a), done = 0;
    WAIT_FOR(a, (done |= nsn_barrier_done(a, token)) || nsn_next_event(a, &event));
    CHECK(!done);
    CHECK_EQUAL(event.kind, NSN_EVENT_HELD_UP);
    CHECK_EQUAL(event.slot, info.slot);
    snprintf(pid, sizeof pid, "process %d ", getpid());
    CHECK(strstr(event.text, pid) && strstr(event.text, "damaged"));
    CHECK_EQUAL(nsn_barrier_done(a, token), 0);
    CHECK_EQUAL(nsn_next_event(a, &event), 0); /* once is enough */
    nsn_session_counters(a, &counters);
    CHECK_EQUAL(counters.held_up, 1);
    nsn_store_release(publishing, 0);
    WAIT_FOR(a, nsn_barrier_done(a, token));
    nsn_session_close(a);
    nsn_session_close(b);
    node_stop(node);
}

TEST(sessions_that_share_no_version_are_not_linked)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session(node), *stranger = node_session(node), *friend = node_session(node);
    struct nsn_session_info info;
    struct nsn_event event;
    nsn_session_info(stranger, &info);
    nsn_slots_speaks(node->slots, info.slot, NSN_PROTOCOL_VERSION + 1, NSN_PROTOCOL_VERSION + 2);
    node_subscribe(stranger, 1, "x", "");
    CHECK_EQUAL(node_publish(a, "x", "1", 1), 0);
    CHECK_EQUAL(nsn_next_event(a, &event), 1);
    CHECK_EQUAL(event.kind, NSN_EVENT_VERSIONS);
    CHECK_EQUAL(event.slot, info.slot);
    CHECK(strstr(event.text, "versions 2 to 3 ") && strstr(event.text, "this one 1 to 1"));
    CHECK_EQUAL(node_publish(a, "x", "2", 1), 0);
    CHECK_EQUAL(nsn_next_event(a, &event), 0); /* once is enough */
    node_subscribe(stranger, 2, "work", "group");
    node_subscribe(friend, 1, "work", "group");
    for (int i = 0; i < 50; i++)
        CHECK_EQUAL(node_publish(a, "work", "3", 1), 1);
    static struct nsn_message messages[256];
    static uint8_t blob[1 << 16];
    int received = 0;
    WAIT_FOR(friend, (received += nsn_receive(friend, messages, 256, blob, sizeof blob, 0)) == 50);
    nsn_session_info(friend, &info);
    nsn_slots_speaks(node->slots, info.slot, NSN_PROTOCOL_VERSION, NSN_PROTOCOL_VERSION + 1);
    CHECK_EQUAL(node_publish(a, "work", "4", 1), 1);
    nsn_session_close(a);
    nsn_session_close(stranger);
    nsn_session_close(friend);
    node_stop(node);
}

CHECK_MAIN()
