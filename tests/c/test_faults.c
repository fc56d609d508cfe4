/* Back-pressure and memory when something goes wrong for long: consumers that do not read, messages that are kept, producers
 * that all have more than fits. */
#include "inbox.h"

static const uint8_t *payload_of(struct nsn_session *session, const struct inbox *inbox, const struct nsn_message *message)
{
    if (message->flags & NSN_MESSAGE_LARGE)
        return nsn_large(session, message->large);
    return inbox->blob + message->offset + message->subject_length + message->reply_length;
}

/* What links and pools occupy in this process, bytes: every mapping's share, so that nothing counts twice. */
static size_t shared_memory(void)
{
    char line[512];
    size_t bytes = 0, share;
    bool ours = false;
    FILE *maps = fopen("/proc/self/smaps", "r");
    CHECK(maps);
    while (fgets(line, sizeof line, maps)) {
        if (strchr("0123456789abcdef", line[0]))
            ours = strstr(line, "/memfd:nsn-") != NULL;
        else if (ours && sscanf(line, "Pss: %zu kB", &share) == 1)
            bytes += share << 10;
    }
    fclose(maps);
    return bytes;
}

/* --- queue groups ----------------------------------------------------------------------------------------------------- */

TEST(a_queue_message_waits_for_a_full_member_until_the_write_deadline)
{
    enum { MESSAGES = 20 };
    struct node *node = node_start();
    struct nsn_session *publisher = node_session(node), *full = node_session(node);
    struct nsn_session *member = node_session_with(node, (struct nsn_session_options){
        .name = "member", .link_limit = 8, .write_deadline_ns = 200000000});
    static struct inbox inbox;
    struct nsn_counters counters;
    struct nsn_event event;
    node_subscribe(member, 1, "work", "group");
    for (int i = 0; i < MESSAGES; i++)
        CHECK_EQUAL(node_publish(publisher, "work", "x", 1), 1);
    node_subscribe(full, 1, "work", "group");
    CHECK_EQUAL(nsn_unsubscribe(member, 1, 0), 0);
    uint64_t began = nsn_now_ns();
    int token = nsn_barrier_begin(member), dozes = 0;
    WAIT_FOR(member, (receive(member, &inbox), nsn_barrier_done(member, token) || (dozes += nsn_doze(member, 1000000000)) < 0));
    CHECK(nsn_now_ns() - began >= 200000000);
    CHECK(dozes < 50); /* it sleeps until there is room, or the deadline has come */
    nsn_session_counters(member, &counters);
    CHECK_EQUAL(counters.passed_on, 1);
    CHECK_EQUAL(counters.dropped, MESSAGES - 1);
    CHECK_EQUAL(nsn_next_event(member, &event), 1);
    CHECK_EQUAL(event.kind, NSN_EVENT_GAVE_UP);
    WAIT_FOR(full, (receive(full, &inbox), nsn_next_event(full, &event)));
    CHECK_EQUAL(event.kind, NSN_EVENT_SLOW_CONSUMER);
    CHECK_EQUAL(event.number, MESSAGES); /* what lay there, and what was dropped */
    nsn_session_close(publisher);
    nsn_session_close(full);
    nsn_session_close(member);
    node_stop(node);
}

/* --- memory ----------------------------------------------------------------------------------------------------------- */

TEST(a_session_stays_within_its_budget_whoever_does_not_read)
{
    enum { CONSUMERS = 6 };
    struct node *node = node_start();
    size_t budget = 24 << 20, most = 0, before = shared_memory();
    struct nsn_session *a = node_session_with(node, (struct nsn_session_options){.name = "a", .budget = budget});
    struct nsn_session *b[CONSUMERS];
    static uint8_t payload[300000];
    static struct inbox inbox;
    uint64_t reached = 0, published = 0, given_up = 0;
    for (uint32_t i = 0; i < CONSUMERS; i++) {
        b[i] = node_session(node);
        node_subscribe(b[i], 1, "all", "");
        node_subscribe(b[i], 2, i % 2 ? "odd" : "even", "");
    }
    for (uint32_t number = 0; number < 20000; number++) {
        const char *subject = number % 3 == 0 ? "all" : number % 3 == 1 ? "odd" : "even";
        size_t length = number % 40 == 7 ? sizeof payload : number % 5 == 0 ? 20000 : 4000;
        int result;
        while ((result = node_publish(a, subject, payload, length)) == -EAGAIN) {
            nsn_session_process(a, 0);
            given_up += (uint64_t)nsn_publish_give_up(a);
        }
        if (result == -ENOBUFS) /* all that could be given up is, and holds the pool: said, not exceeded */
            continue;
        CHECK(result > 0);
        reached += (uint64_t)result;
        published++;
        if (number % 500 == 0 && shared_memory() > most)
            most = shared_memory();
    }
    struct nsn_counters counters;
    nsn_session_counters(a, &counters);
    printf("budget %zu KiB: at most %zu KiB in links and pool, %llu published, %llu links given up, %llu dropped\n",
           budget >> 10, (most - before) >> 10, (unsigned long long)published, (unsigned long long)given_up,
           (unsigned long long)counters.dropped);
    CHECK(given_up >= 1);
    CHECK(most - before <= budget + (2 << 20)); /* it is looked at every 256 publishes */
    CHECK(most - before > budget / 2);
    uint64_t received = 0, discarded = 0;
    uint64_t until = nsn_now_ns() + 20000000000ull;
    while (received + discarded < reached) {
        CHECK(nsn_now_ns() < until);
        for (int i = 0; i < CONSUMERS; i++) {
            int count = receive(b[i], &inbox);
            received += (uint64_t)count;
            for (int k = 0; k < count; k++)
                if (inbox.messages[k].flags & NSN_MESSAGE_LARGE)
                    nsn_large_release(b[i], inbox.messages[k].large);
            struct nsn_event event;
            while (nsn_next_event(b[i], &event))
                discarded += event.kind == NSN_EVENT_SLOW_CONSUMER ? event.number : 0;
        }
    }
    CHECK_EQUAL(received + discarded, reached);
    nsn_session_close(a);
    for (int i = 0; i < CONSUMERS; i++)
        nsn_session_close(b[i]);
    node_stop(node);
}

static uint32_t receive_and_release(struct nsn_session *session, struct inbox *inbox)
{
    int count = receive(session, inbox);
    for (int i = 0; i < count; i++)
        nsn_large_release(session, inbox->messages[i].large);
    return (uint32_t)count;
}

TEST(consumers_that_were_given_up_leave_room_for_the_others)
{
    enum { STOPPED = 4, MESSAGES = 500 };
    struct node *node = node_start();
    struct nsn_session *a = node_session_with(node, (struct nsn_session_options){.name = "a", .budget = 24 << 20});
    struct nsn_session *reader = node_session(node), *stopped[STOPPED];
    static uint8_t payload[100000];
    static struct inbox inbox;
    node_subscribe(reader, 1, "x", "");
    uint32_t sent = 0, received = 0;
    for (uint32_t i = 0; i < STOPPED; i++) { /* each in its turn holds what it can get */
        stopped[i] = node_session(node);
        node_subscribe(stopped[i], 1, "x", "");
        for (uint32_t number = 0; number < MESSAGES; number++, sent++) {
            int result;
            while ((result = node_publish(a, "x", payload, sizeof payload)) == -EAGAIN) {
                WAIT_FOR(a, (received += receive_and_release(reader, &inbox)) == sent);
                if (!nsn_space(a))
                    nsn_publish_give_up(a);
            }
            CHECK(result >= 1);
            received += receive_and_release(reader, &inbox);
        }
    }
    WAIT_FOR(a, (received += receive_and_release(reader, &inbox)) >= STOPPED * MESSAGES);
    CHECK_EQUAL(received, STOPPED * MESSAGES);
    nsn_session_close(a);
    nsn_session_close(reader);
    for (uint32_t i = 0; i < STOPPED; i++)
        nsn_session_close(stopped[i]);
    node_stop(node);
}

TEST(a_message_that_is_kept_pins_its_block_and_nothing_else)
{
    struct node *node = node_start();
    struct nsn_session *a = node_session_with(node, (struct nsn_session_options){.name = "a", .budget = 64 << 20});
    struct nsn_session *b = node_session(node);
    static struct inbox inbox;
    size_t size = 1 << 20, most = 0;
    uint8_t *payload = malloc(size);
    uint32_t kept[3];
    int kept_count = 0;
    node_subscribe(b, 1, "big", "");
    for (uint32_t number = 0; number < 1000; number++) {
        memset(payload, (int)number, size);
        CHECK_EQUAL(node_publish(a, "big", payload, size), 1);
        int count;
        WAIT_FOR(b, (count = receive(b, &inbox)) > 0);
        CHECK_EQUAL(count, 1);
        const uint8_t *data = nsn_large(b, inbox.messages[0].large);
        CHECK(data[0] == (uint8_t)number && data[size - 1] == (uint8_t)number);
        if (number == 0 || number == 10 || number == 500)
            kept[kept_count++] = inbox.messages[0].large;
        else
            nsn_large_release(b, inbox.messages[0].large);
        if (number % 100 == 99 && shared_memory() > most)
            most = shared_memory();
    }
    printf("3 of 1000 messages of 1 MiB kept: at most %zu KiB in use\n", most >> 10);
    CHECK(most < 8 * size);
    const uint32_t numbers[3] = {0, 10, 500};
    for (int i = 0; i < 3; i++) {
        const uint8_t *data = nsn_large(b, kept[i]);
        for (size_t at = 0; at < size; at += 4096)
            CHECK_EQUAL(data[at], (uint8_t)numbers[i]);
    }
    nsn_session_close(a); /* what is kept outlives its publisher */
    struct nsn_counters counters;
    WAIT_FOR(b, (receive(b, &inbox), nsn_session_counters(b, &counters), counters.links_in) == 0);
    for (int i = 0; i < 3; i++) {
        CHECK_EQUAL(nsn_large(b, kept[i])[size / 2], (uint8_t)numbers[i]);
        nsn_large_release(b, kept[i]);
    }
    CHECK_EQUAL(shared_memory(), 0);
    free(payload);
    nsn_session_close(b);
    node_stop(node);
}

/* --- back-pressure ---------------------------------------------------------------------------------------------------- */

TEST(producers_whose_links_are_all_full_are_served_alike)
{
    enum { PRODUCERS = 60, MESSAGES = 60000 };
    struct node *node = node_start();
    struct nsn_session *producers[PRODUCERS], *b = node_session(node);
    uint32_t got[PRODUCERS] = {0}, next[PRODUCERS] = {0}, sent[PRODUCERS] = {0};
    static struct inbox inbox;
    uint8_t payload[500] = {0};
    node_subscribe(b, 1, "x", "");
    for (uint32_t i = 0; i < PRODUCERS; i++)
        producers[i] = node_session_with(node, (struct nsn_session_options){.name = "p", .link_limit = 1 << 15});
    uint32_t total = 0;
    uint64_t until = nsn_now_ns() + 60000000000ull;
    while (total < MESSAGES) {
        for (uint32_t i = 0; i < PRODUCERS; i++) {
            for (;;) {
                memcpy(payload, (uint32_t[2]){i, sent[i]}, 8);
                if (node_publish(producers[i], "x", payload, sizeof payload) != 1)
                    break;
                sent[i]++;
            }
            nsn_session_process(producers[i], 0);
            nsn_space(producers[i]);
        }
        int count = receive(b, &inbox);
        for (int k = 0; k < count; k++) {
            uint32_t head[2];
            memcpy(head, payload_of(b, &inbox, &inbox.messages[k]), sizeof head);
            CHECK_EQUAL(head[1], next[head[0]]++); /* in order, none missing */
            got[head[0]]++;
        }
        total += (uint32_t)count;
        CHECK(nsn_now_ns() < until);
    }
    uint32_t least = UINT32_MAX, most = 0;
    for (uint32_t i = 0; i < PRODUCERS; i++) {
        least = got[i] < least ? got[i] : least;
        most = got[i] > most ? got[i] : most;
    }
    printf("%d producers, %u messages: %u to %u from each\n", PRODUCERS, total, least, most);
    CHECK(least > MESSAGES / PRODUCERS / 2 && most < MESSAGES / PRODUCERS * 2);
    for (uint32_t i = 0; i < PRODUCERS; i++)
        nsn_session_close(producers[i]);
    nsn_session_close(b);
    node_stop(node);
}

struct flood {
    struct nsn_session *session;
    uint64_t reached, given_up;
    bool over;
};

static void *flood(void *context)
{
    struct flood *flood = context;
    static uint8_t payload[2000];
    for (uint32_t i = 0; i < 300000; i++) {
        int result;
        while ((result = node_publish(flood->session, "x", payload, i % 10 ? 100 : sizeof payload)) == -EAGAIN)
            flood->given_up += (uint64_t)nsn_publish_give_up(flood->session);
        CHECK(result >= 0);
        flood->reached += (uint64_t)result;
        if (i % 1000 == 0)
            nsn_session_process(flood->session, 0);
    }
    __atomic_store_n(&flood->over, true, __ATOMIC_RELEASE);
    return NULL;
}

TEST(what_a_slow_consumer_does_not_get_is_counted_exactly)
{
    struct node *node = node_start();
    struct nsn_session_options options = {.name = "a", .link_limit = 1 << 15};
    struct flood work = {.session = node_session_with(node, options)};
    struct nsn_session *b = node_session(node);
    static struct inbox inbox;
    pthread_t thread;
    uint64_t received = 0, discarded = 0, slow = 0, until = 0;
    node_subscribe(b, 1, "x", "");
    pthread_create(&thread, NULL, flood, &work);
    while (!until || received + discarded != work.reached) {
        received += (uint64_t)receive(b, &inbox);
        struct nsn_event event;
        while (nsn_next_event(b, &event)) {
            CHECK_EQUAL(event.kind, NSN_EVENT_SLOW_CONSUMER);
            discarded += event.number;
            slow++;
        }
        if (slow % 2 == 0)
            usleep(200);
        if (!until && __atomic_load_n(&work.over, __ATOMIC_ACQUIRE)) {
            pthread_join(thread, NULL);
            until = nsn_now_ns() + 3000000000ull;
        }
        if (until && nsn_now_ns() > until)
            break;
    }
    struct nsn_counters out, in;
    nsn_session_counters(work.session, &out);
    nsn_session_counters(b, &in);
    printf("%llu published, %llu received, %llu discarded in %llu times (producer: %llu given up, %llu dropped)\n",
           (unsigned long long)work.reached, (unsigned long long)received, (unsigned long long)discarded,
           (unsigned long long)slow, (unsigned long long)work.given_up, (unsigned long long)out.dropped);
    CHECK_EQUAL(received + discarded, work.reached);
    CHECK_EQUAL(in.messages_in, received);
    CHECK_EQUAL(in.discarded, discarded);
    CHECK_EQUAL(in.slow_consumer, work.given_up);
    CHECK(slow >= work.given_up); /* more where a publish was under way just then */
    nsn_session_close(work.session);
    nsn_session_close(b);
    node_stop(node);
}

CHECK_MAIN()
