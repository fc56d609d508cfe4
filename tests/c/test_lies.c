/* Peers that lie: every word and byte that a peer can write, written by intent and at random, in turns with the victim and
 * while it runs at full speed. The victim ignores it, or counts it and drops that link; what others say arrives meanwhile.
 *
 * A failing seed is printed; NSN_SEED=number runs that one alone. NSN_SECONDS: how long each random test lasts. */
#include <signal.h>

#include "liar.h"
#include "nsn_session_internal.h"

#define CALL_NS 5000000000ull /* what a call may take on a machine that does much else; it should be microseconds */
#define STUCK_S 60u
#define GOOD_MAGIC 0x600d600d600d600dull
#define SEGMENT_SIZE (1u << 20)
#define WORLD_SEEDS 64u /* seeds that share one victim, one after the other */

/* --- saying which seed it was ----------------------------------------------------------------------------------------- */

static const char *doing;
static uint64_t doing_seed;

static void tell(void)
{
    char words[160];
    if (!doing)
        return;
    int length = snprintf(words, sizeof words, "in %s, NSN_SEED=%llu\n", doing, (unsigned long long)doing_seed);
    if (write(2, words, (size_t)length) < 0)
        _exit(1);
}

static void struck(int signal_number)
{
    tell();
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

__attribute__((constructor)) static void listen_for_the_end(void)
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

static uint64_t seconds_ns(double by_default)
{
    const char *given = getenv("NSN_SECONDS");
    double factor = __sanitizer_set_death_callback ? 1 : 0.25; /* it is the sanitizers that see harm */
    return (uint64_t)((given ? strtod(given, NULL) : by_default * factor) * 1e9);
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

static void subscribe(struct nsn_session *session, uint32_t sid, const char *pattern, const char *queue)
{
    CHECK_EQUAL(nsn_subscribe(session, sid, pattern, strlen(pattern), queue, strlen(queue)), 0);
}

static void new_liar(struct world *world)
{
    liar_hello(&world->liar, world->node);
    liar_subscribe(&world->liar, 1, "l", "");
    liar_subscribe(&world->liar, 2, "l", "w"); /* some of the victim's messages go to it or to the good peer */
    liar_link(&world->liar, world->victim);
}

static void open_world(struct world *world, struct node *node)
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

static uint64_t link_errors(struct nsn_session *session)
{
    struct nsn_counters counters;
    nsn_session_counters(session, &counters);
    return counters.link_errors;
}

static void release_all(struct world *world)
{
    for (uint32_t i = 0; i < world->held_count; i++)
        nsn_large_release(world->victim, world->held[i]);
    world->held_count = 0;
}

static uint64_t sum(const uint8_t *bytes, uint64_t length) /* every byte can be read */
{
    volatile uint64_t total = 0;
    for (uint64_t i = 0; i < length; i += 512)
        total += bytes[i];
    return length ? total + bytes[length - 1] : total;
}

static void check_message(struct world *world, const struct nsn_message *message)
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
static int turn(struct world *world)
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
static int good_reads(struct world *world)
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

static void good_says(struct world *world, int messages)
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
static void hear_the_good(struct world *world)
{
    uint64_t until = nsn_now_ns() + CALL_NS;
    while (world->good_seen < world->good_sent) {
        turn(world);
        good_reads(world);
        CHECK(nsn_now_ns() < until && "what the good peer said comes");
    }
}

/* flush() of a program: the barrier is done within a bounded time. */
static void flush(struct world *world, struct nsn_session *session)
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
static void falls_asleep(struct world *world)
{
    uint64_t until = nsn_now_ns() + CALL_NS;
    while (!nsn_arm(world->victim)) {
        turn(world);
        good_reads(world);
        CHECK(nsn_now_ns() < until && "the victim finds rest");
    }
    nsn_disarm(world->victim);
}

static void close_world(struct world *world, bool heard)
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

static void with_world(void (*run)(struct world *))
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

/* --- lies of a producer, by intent -------------------------------------------------------------------------------------- */

enum outcome { BROKEN, IGNORED, DELIVERED };

struct lie {
    const char *what;
    void (*tell)(struct liar *liar, struct nsn_record *record); /* of a record that is not committed yet */
    enum outcome outcome;
    bool pool;
    uint32_t sid;
    bool behind;                  /* told after the record was committed and read */
};

#define LIE(name, body)                                                                                                     \
    static void name(struct liar *liar, struct nsn_record *record)                                                          \
    {                                                                                                                       \
        (void)liar, (void)record;                                                                                           \
        body;                                                                                                               \
    }
#define TAIL(liar) nsn_link_out_tail32(liar->out) * 8ull

LIE(length_zero, record->length = 0)
LIE(length_odd, record->length += 1)
LIE(length_short, record->length = 24)
LIE(length_huge, record->length = 0xfffffff8u)
LIE(length_past_limit, record->length = NSN_RECORD_MAX + 8)
LIE(length_past_tail, record->length += 64)
LIE(skip_first, record->length = NSN_RECORD_SKIP)
LIE(kind_zero, record->kind = 0)
LIE(kind_unknown, record->kind = 3)
LIE(no_sid, record->sid_count = 0)
LIE(many_sids, record->sid_count = NSN_RECORD_SIDS + 1)
LIE(all_sids, record->sid_count = UINT16_MAX)
LIE(no_subject, record->subject_length = 0)
LIE(long_subject, record->subject_length = 4097)
LIE(subject_past_end, record->subject_length = 4096)
LIE(longest_subject, record->subject_length = UINT16_MAX)
LIE(long_reply, record->reply_length = 4097)
LIE(reply_past_end, record->reply_length = 4096)
LIE(long_headers, record->header_length = UINT32_MAX)
LIE(headers_past_end, record->header_length = 64)
LIE(long_payload, record->payload_length = UINT64_MAX)
LIE(payload_past_end, record->payload_length += 8)
LIE(payload_wraps, record->payload_length = UINT64_MAX - 31; record->header_length = 64)
LIE(pool_payload_huge, record->payload_length = UINT64_MAX)
LIE(pool_payload_past_segment, record->payload_length = 70 << 20)
LIE(pool_offset_past_segment, liar_ref(record)->offset = 64 << 20)
LIE(pool_offset_huge, liar_ref(record)->offset = UINT64_MAX - 7)
LIE(pool_offset_at_end, liar_ref(record)->offset = SEGMENT_SIZE; record->payload_length = SEGMENT_SIZE)
LIE(pool_ref_past_table, liar_ref(record)->ref = NSN_LINK_REFS)
LIE(pool_ref_huge, liar_ref(record)->ref = UINT32_MAX)
LIE(pool_use_zero, liar_ref(record)->use = 0)
LIE(pool_without_reference, record->flags |= NSN_RECORD_POOL)
LIE(gone_with_sids, record->kind = NSN_RECORD_SEGMENT_GONE)
LIE(gone_without_pool, record->kind = NSN_RECORD_SEGMENT_GONE; record->sid_count = 0; record->subject_length = 0;
    record->payload_length = 0)
LIE(gone_of_nothing, uint64_t stamp = record->stamp; memset((uint8_t *)record + 4, 0, sizeof *record + 20);
    record->kind = NSN_RECORD_SEGMENT_GONE; record->flags = NSN_RECORD_POOL; record->stamp = stamp;
    ((struct nsn_pool_ref *)(record + 1))->segment = 12345)
LIE(stamp_of_tomorrow, record->stamp += 86400000000000ull)
LIE(stamp_never, record->stamp = UINT64_MAX)
LIE(stamp_zero, record->stamp = 0)
LIE(unknown_flags, record->flags |= 0xf0)
LIE(map_past_end, liar->file->producer.map[0] = NSN_LINK_CHUNKS)
LIE(map_huge, liar->file->producer.map[0] = UINT16_MAX)
LIE(tail_far, nsn_store_release(&liar->file->producer.tail, 1ull << 60))
LIE(tail_full, nsn_store_release(&liar->file->producer.tail, TAIL(liar) + (uint64_t)NSN_LINK_CHUNKS * NSN_LINK_CHUNK + 8))
LIE(tail_odd, nsn_store_release(&liar->file->producer.tail, TAIL(liar) + 4))
LIE(tail_ahead, nsn_store_release(&liar->file->producer.tail, TAIL(liar) + 64))
LIE(tail_back, nsn_store_release(&liar->file->producer.tail, TAIL(liar) - 8))
LIE(tail_zero, nsn_store_release(&liar->file->producer.tail, 0))
LIE(stall_back, nsn_store_release(&liar->file->producer.stall, UINT64_MAX))
LIE(dropped_back, nsn_store_release(&liar->file->producer.dropped, UINT64_MAX))
LIE(want_all, nsn_store_release(&liar->file->producer.want, UINT64_MAX))
LIE(page_of_ones, memset(&liar->file->producer, 0xff, 4096))
LIE(page_of_zeros, memset(&liar->file->producer, 0, 4096))
LIE(words_of_the_victim, memset(&liar->file->consumer, 0xff, sizeof liar->file->consumer))

static const struct lie lies[] = {
    {.what = "length 0", .tell = length_zero},
    {.what = "length not a multiple of 8", .tell = length_odd},
    {.what = "length shorter than a record", .tell = length_short},
    {.what = "length of 4 GiB", .tell = length_huge},
    {.what = "length above the limit", .tell = length_past_limit},
    {.what = "length behind the tail", .tell = length_past_tail},
    {.what = "a skipped chunk that was only begun", .tell = skip_first},
    {.what = "kind 0", .tell = kind_zero},
    {.what = "unknown kind", .tell = kind_unknown},
    {.what = "no sid", .tell = no_sid},
    {.what = "too many sids", .tell = many_sids},
    {.what = "65,535 sids", .tell = all_sids},
    {.what = "no subject", .tell = no_subject},
    {.what = "subject of 4,097 bytes", .tell = long_subject},
    {.what = "subject behind the record", .tell = subject_past_end},
    {.what = "subject of 65,535 bytes", .tell = longest_subject},
    {.what = "reply of 4,097 bytes", .tell = long_reply},
    {.what = "reply behind the record", .tell = reply_past_end},
    {.what = "headers of 4 GiB", .tell = long_headers},
    {.what = "headers behind the record", .tell = headers_past_end},
    {.what = "payload of 2^64 bytes", .tell = long_payload},
    {.what = "payload behind the record", .tell = payload_past_end},
    {.what = "payload and headers that add up to little", .tell = payload_wraps},
    {.what = "pool payload of 2^64 bytes", .tell = pool_payload_huge, .pool = true},
    {.what = "pool payload longer than its segment", .tell = pool_payload_past_segment, .pool = true},
    {.what = "pool offset behind its segment", .tell = pool_offset_past_segment, .pool = true},
    {.what = "pool offset near 2^64", .tell = pool_offset_huge, .pool = true},
    {.what = "pool payload that begins at the end", .tell = pool_offset_at_end, .pool = true},
    {.what = "pool reference behind the table", .tell = pool_ref_past_table, .pool = true},
    {.what = "pool reference 2^32 - 1", .tell = pool_ref_huge, .pool = true},
    {.what = "use number 0", .tell = pool_use_zero, .pool = true},
    {.what = "pool flag without a reference", .tell = pool_without_reference},
    {.what = "segment gone, for subscriptions", .tell = gone_with_sids, .pool = true},
    {.what = "segment gone, without a reference", .tell = gone_without_pool},
    {.what = "segment gone that never was", .tell = gone_of_nothing, .pool = true, .outcome = IGNORED},
    {.what = "stamp of tomorrow", .tell = stamp_of_tomorrow},
    {.what = "largest stamp", .tell = stamp_never},
    {.what = "stamp 0", .tell = stamp_zero, .outcome = DELIVERED},
    {.what = "unknown flags", .tell = unknown_flags, .outcome = DELIVERED},
    {.what = "unknown subscription", .tell = unknown_flags, .outcome = IGNORED, .sid = 4711},
    {.what = "chunk behind the file", .tell = map_past_end},
    {.what = "chunk 65,535", .tell = map_huge},
    {.what = "tail at 2^60", .tell = tail_far, .behind = true},
    {.what = "tail further than a link holds", .tell = tail_full, .behind = true},
    {.what = "tail not a multiple of 8", .tell = tail_odd, .behind = true},
    {.what = "tail behind what was written", .tell = tail_ahead, .behind = true},
    {.what = "tail that moves back", .tell = tail_back, .behind = true},
    {.what = "tail that is 0 again", .tell = tail_zero, .behind = true},
    {.what = "stall number 2^64 - 1, and 0 again", .tell = stall_back, .behind = true, .outcome = IGNORED},
    {.what = "dropped number 2^64 - 1", .tell = dropped_back, .behind = true, .outcome = IGNORED},
    {.what = "want number 2^64 - 1", .tell = want_all, .behind = true, .outcome = IGNORED},
    {.what = "words of ones", .tell = page_of_ones, .behind = true},
    {.what = "words of zeros", .tell = page_of_zeros, .behind = true},
    {.what = "the victim's own words", .tell = words_of_the_victim, .behind = true, .outcome = IGNORED},
};

static void tell_lie(struct world *world, const struct lie *lie)
{
    uint64_t errors = link_errors(world->victim), forged = world->forged;
    struct liar_record wanted = {.sids = {lie->sid ? lie->sid : 1}, .sid_count = 1, .subject = "v", .payload_length = 100,
                                 .pool = lie->pool};
    struct nsn_record *record = liar_reserve(&world->liar, &wanted);
    CHECK(record);
    if (!lie->behind)
        lie->tell(&world->liar, record);
    liar_commit(&world->liar);
    if (lie->behind) {
        uint64_t until = nsn_now_ns() + CALL_NS;
        while (world->forged == forged)
            CHECK(turn(world) || nsn_now_ns() < until);
        forged = world->forged;
        lie->tell(&world->liar, record);
        liar_announce(&world->liar);
        *liar_board(&world->liar) += 2;
    }
    good_says(world, 5);
    hear_the_good(world);
    falls_asleep(world);
    flush(world, world->victim);
    CHECK_EQUAL(link_errors(world->victim) - errors, lie->outcome == BROKEN);
    CHECK_EQUAL(world->forged - forged, lie->outcome == DELIVERED);
}

static void each_lie(struct world *world)
{
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        doing = lies[i].what;
        tell_lie(world, &lies[i]);
        struct nsn_event event;
        bool told = false;
        while (nsn_next_event(world->victim, &event))
            told |= event.kind == NSN_EVENT_LINK_BROKEN && event.slot == world->liar.slot && event.text[0];
        CHECK_EQUAL(told, lies[i].outcome == BROKEN);
        liar_link(&world->liar, world->victim);
    }
    doing = NULL;
}

TEST(each_lie_of_a_producer_breaks_its_link_alone_or_is_ignored) { with_world(each_lie); }

static void one_sid_many_times(struct world *world)
{
    struct liar_record wanted = {.sid_count = NSN_RECORD_SIDS, .subject = "q", .payload_length = 900 << 10, .pool = true};
    for (uint32_t i = 0; i < NSN_RECORD_SIDS; i++)
        wanted.sids[i] = 3;
    struct nsn_record *record = liar_reserve(&world->liar, &wanted);
    CHECK(record);
    record->payload_length = SEGMENT_SIZE / 2;
    CHECK_EQUAL(nsn_unsubscribe(world->victim, 3, 0), 0); /* what comes for it is to be passed on: copied */
    liar_commit(&world->liar);
    uint64_t until = nsn_now_ns() + 200000000ull;
    while (nsn_now_ns() < until) {
        turn(world);
        CHECK(world->victim->passing_bytes <= 4 * SEGMENT_SIZE);
    }
    good_says(world, 5);
    hear_the_good(world);
    subscribe(world->victim, 3, "q", "g");
}

TEST(a_queue_message_for_one_member_many_times_is_not_multiplied) { with_world(one_sid_many_times); }

static void unknown_segment(struct world *world)
{
    struct liar_record wanted = {.sids = {1}, .sid_count = 1, .subject = "v", .payload_length = 100, .pool = true};
    struct nsn_record *record = liar_reserve(&world->liar, &wanted);
    liar_ref(record)->segment = 4711;
    liar_commit(&world->liar);
    for (int i = 0; i < 20; i++) {
        good_says(world, 5);
        hear_the_good(world);
    }
    falls_asleep(world);
    flush(world, world->victim);
    CHECK_EQUAL(world->forged, 0);
}

TEST(a_segment_that_never_comes_holds_nobody_up) { with_world(unknown_segment); }

static void quiet_tail(struct world *world)
{
    struct liar_record wanted = {.sids = {1}, .sid_count = 1, .subject = "v", .payload_length = 100};
    turn(world);
    turn(world);
    CHECK(liar_reserve(&world->liar, &wanted));
    nsn_link_out_commit(world->liar.out); /* and no word on the board */
    good_says(world, 5);
    hear_the_good(world);
    flush(world, world->victim);
    CHECK_EQUAL(world->forged, 1);
}

TEST(a_record_that_is_not_announced_does_not_hold_a_barrier_up) { with_world(quiet_tail); }

/* --- lies about descriptors ---------------------------------------------------------------------------------------------- */

static int memfd(uint64_t size, int seals)
{
    char error[128];
    int fd = nsn_memfd_create("lie", size, error, sizeof error);
    CHECK(fd >= 0);
    CHECK(seals == 0 || nsn_memfd_seal(fd, seals, error, sizeof error) == 0);
    return fd;
}

/* A link's file, sealed as it should be, with the words given. */
static int link_file(uint64_t magic, uint32_t version, uint32_t chunks, uint64_t link_id, int seals)
{
    char error[128];
    int fd = memfd(sizeof(struct nsn_link_file), 0);
    struct nsn_link_file *file = nsn_memfd_map(fd, sizeof *file, PROT_READ | PROT_WRITE, error, sizeof error);
    CHECK(file);
    file->producer.magic = magic;
    file->producer.version = version;
    file->producer.chunks = chunks;
    file->producer.link_id = link_id;
    munmap(file, sizeof *file);
    CHECK(seals == 0 || nsn_memfd_seal(fd, seals, error, sizeof error) == 0);
    return fd;
}

static void hand_over_and_check(struct world *world, const char *what, int fd)
{
    uint64_t errors = link_errors(world->victim), until = nsn_now_ns() + CALL_NS;
    doing = what;
    CHECK(fd >= 0);
    liar_hand_over(&world->liar, ++world->liar.link_ids, fd);
    close(fd);
    while (link_errors(world->victim) == errors) {
        turn(world);
        CHECK(nsn_now_ns() < until && "a link that is none is counted");
    }
    good_says(world, 2);
    hear_the_good(world);
    CHECK_EQUAL(link_errors(world->victim), errors + 1);
    doing = NULL;
}

#define MAGIC NSN_LINK_MAGIC
#define SEALED NSN_LINK_SEALS
#define SIZE sizeof(struct nsn_link_file)

static void false_links(struct world *world)
{
    uint64_t *id = &world->liar.link_ids;
    int ends[2];
    CHECK_EQUAL(pipe(ends), 0);
    close(ends[1]);
    hand_over_and_check(world, "a pipe", ends[0]);
    hand_over_and_check(world, "a socket", socket(AF_UNIX, SOCK_STREAM, 0));
    hand_over_and_check(world, "a device", open("/dev/zero", O_RDWR));
    hand_over_and_check(world, "a directory", open("/", O_RDONLY | O_DIRECTORY));
    hand_over_and_check(world, "a place", open("/", O_PATH));
    hand_over_and_check(world, "not sealed", link_file(MAGIC, NSN_LINK_VERSION, NSN_LINK_CHUNKS, *id + 1, 0));
    hand_over_and_check(world, "may shrink", link_file(MAGIC, NSN_LINK_VERSION, NSN_LINK_CHUNKS, *id + 1, F_SEAL_GROW | F_SEAL_SEAL));
    hand_over_and_check(world, "seals may be added",
                        link_file(MAGIC, NSN_LINK_VERSION, NSN_LINK_CHUNKS, *id + 1, F_SEAL_GROW | F_SEAL_SHRINK));
    hand_over_and_check(world, "cannot be written",
                        link_file(MAGIC, NSN_LINK_VERSION, NSN_LINK_CHUNKS, *id + 1, SEALED | F_SEAL_WRITE));
    hand_over_and_check(world, "cannot be written from now on",
                        link_file(MAGIC, NSN_LINK_VERSION, NSN_LINK_CHUNKS, *id + 1, SEALED | F_SEAL_FUTURE_WRITE));
    hand_over_and_check(world, "empty", memfd(0, SEALED));
    hand_over_and_check(world, "truncated", memfd(SIZE - 4096, SEALED));
    hand_over_and_check(world, "longer", memfd(SIZE + 4096, SEALED));
    hand_over_and_check(world, "without a magic number", memfd(SIZE, SEALED));
    hand_over_and_check(world, "another magic number", link_file(1, NSN_LINK_VERSION, NSN_LINK_CHUNKS, *id + 1, SEALED));
    hand_over_and_check(world, "another version", link_file(MAGIC, NSN_LINK_VERSION + 1, NSN_LINK_CHUNKS, *id + 1, SEALED));
    hand_over_and_check(world, "more chunks", link_file(MAGIC, NSN_LINK_VERSION, NSN_LINK_CHUNKS + 1, *id + 1, SEALED));
    hand_over_and_check(world, "another link", link_file(MAGIC, NSN_LINK_VERSION, NSN_LINK_CHUNKS, *id + 2, SEALED));
}

TEST(a_descriptor_that_is_no_link_is_counted_and_not_mapped) { with_world(false_links); }

static void segment_and_check(struct world *world, const char *what, uint64_t claimed, int fd)
{
    uint64_t errors = link_errors(world->victim), until = nsn_now_ns() + CALL_NS;
    doing = what;
    liar_hand_over_segment(&world->liar, 99 * NSN_POOL_SEGMENTS, claimed, fd);
    close(fd);
    while (link_errors(world->victim) == errors) {
        turn(world);
        CHECK(nsn_now_ns() < until && "a segment that is none breaks the link");
    }
    good_says(world, 2);
    hear_the_good(world);
    flush(world, world->victim);
    CHECK_EQUAL(link_errors(world->victim), errors + 1);
    liar_link(&world->liar, world->victim);
    doing = NULL;
}

static void false_segments(struct world *world)
{
    const int sealed = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
    const uint64_t size = 1 << 20;
    segment_and_check(world, "not sealed", size, memfd(size, 0));
    segment_and_check(world, "may shrink", size, memfd(size, F_SEAL_GROW | F_SEAL_FUTURE_WRITE));
    segment_and_check(world, "can be written", size, memfd(size, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL));
    segment_and_check(world, "shorter than claimed", size, memfd(size - 4096, sealed));
    segment_and_check(world, "longer than claimed", size, memfd(size + 4096, sealed));
    segment_and_check(world, "empty", 0, memfd(0, sealed));
    segment_and_check(world, "larger than any block", (72ull << 20) + 4096, memfd((72ull << 20) + 4096, sealed));
    segment_and_check(world, "claimed to be 2^64 bytes", UINT64_MAX, memfd(size, sealed));
    segment_and_check(world, "a device", size, open("/dev/zero", O_RDWR));
}

TEST(a_segment_that_is_none_breaks_its_link) { with_world(false_segments); }

static void many_links(struct world *world)
{
    struct liar_record wanted = {.sids = {1}, .sid_count = 1, .subject = "v", .payload_length = 100, .pool = true};
    for (int i = 0; i < 300; i++) {
        struct nsn_record *record = liar_reserve(&world->liar, &wanted);
        liar_ref(record)->segment = 4711; /* so that none is read to its end */
        liar_commit(&world->liar);
        int fd = liar_make_link(&world->liar);
        liar_hand_over(&world->liar, world->liar.link_ids, fd);
        close(fd);
        nsn_session_process(world->victim, 0);
        struct nsn_counters counters;
        nsn_session_counters(world->victim, &counters);
        CHECK(counters.links_in <= 20);
    }
    good_says(world, 5);
    hear_the_good(world);
}

TEST(a_producer_that_hands_over_link_after_link_does_not_fill_the_address_space) { with_world(many_links); }

/* --- lies of a consumer, by intent ----------------------------------------------------------------------------------------- */

static int victim_says(struct world *world, const void *payload, size_t length)
{
    int result = -EALREADY;
    for (int i = 0; i < 1000 && result == -EALREADY; i++) {
        IN_TIME(result = node_publish(world->victim, "l", payload, length));
        nsn_session_process(world->victim, 0);
    }
    CHECK(result >= 0 || result == -EAGAIN || result == -ENOBUFS || result == -EALREADY);
    return result;
}

struct consumer_lie {
    const char *what;
    size_t offset;                /* of the word in struct nsn_link_file */
    uint64_t value;
    bool broken;
};

#define WORD(name) offsetof(struct nsn_link_file, consumer.name)

static const struct consumer_lie consumer_lies[] = {
    {"head behind the tail", WORD(head), 1 << 20, true},
    {"head at 2^63", WORD(head), 1ull << 63, true},
    {"head not a multiple of 8", WORD(head), 12, true},
    {"head at 2^64 - 8", WORD(head), UINT64_MAX - 7, true},
    {"consumed more than was sent", WORD(consumed), 1 << 20, true},
    {"consumed 2^64 - 1", WORD(consumed), UINT64_MAX, true},
    {"taken twice", WORD(taken), 2, false},
    {"giving back for ever", WORD(trim), 1, false},
    {"giving back number 2^64 - 1", WORD(trim), UINT64_MAX, false},
    {"has given back what it never began", WORD(trimmed), 1000, false},
    {"acknowledged what was not said", WORD(stall_acknowledged), 1, false},
    {"releases what it was not sent", WORD(released), 0x0000000100000001ull, false},
    {"has passed on 2^64 - 1 bytes", WORD(passed), UINT64_MAX, false},
};

static void each_consumer_lie(struct world *world)
{
    static uint8_t payload[20000];
    for (size_t i = 0; i < sizeof consumer_lies / sizeof consumer_lies[0]; i++) {
        const struct consumer_lie *lie = &consumer_lies[i];
        uint64_t errors = link_errors(world->victim);
        doing = lie->what;
        if (world->liar.in)
            munmap(world->liar.in, SIZE);
        world->liar.in = NULL;
        for (int round = 0; !world->liar.in; round++) {
            CHECK(round < 1000000);
            if (round == 0)
                victim_says(world, payload, 100);
            nsn_session_process(world->victim, 0);
            liar_take(&world->liar);
        }
        for (int round = 0; round < 20; round++) {
            memset(payload, round, sizeof payload);
            if (round == 5)
                memcpy((uint8_t *)world->liar.in + lie->offset, &lie->value, 8);
            victim_says(world, payload, round % 3 ? 8000 : sizeof payload);
            good_reads(world);
        }
        CHECK_EQUAL(link_errors(world->victim) - errors, lie->broken);
        memcpy((uint8_t *)world->liar.in + WORD(head), &(uint64_t){1}, 8); /* and broken now, so that the next gets a new one */
        errors = link_errors(world->victim);
        for (int round = 0; !lie->broken && link_errors(world->victim) == errors; round++) {
            CHECK(round < 100);
            victim_says(world, payload, 8000);
            good_reads(world);
        }
        flush(world, world->victim);
    }
    doing = NULL;
}

TEST(each_lie_of_a_consumer_breaks_its_link_alone_or_is_ignored) { with_world(each_consumer_lie); }

static void bomb(struct world *world)
{
    static uint8_t payload[200000];
    struct liar *liar = &world->liar;
    liar_subscribe(liar, 3, "only", "w");
    CHECK_EQUAL(node_publish(world->victim, "only", payload, sizeof payload), 1);
    node_subscribe(world->good, 5, "only", "w");
    while (!liar->in) {
        nsn_session_process(world->victim, 0);
        liar_take(liar);
    }
    struct nsn_record *record = (struct nsn_record *)(void *)liar->in->chunk[0];
    struct nsn_pool_ref ref;
    memcpy(&ref, (uint8_t *)(record + 1) + 8, sizeof ref);
    CHECK_EQUAL(record->payload_length, sizeof payload);
    uint32_t length = sizeof *record + 4 * NSN_RECORD_SIDS + sizeof ref + 8;
    for (uint32_t i = 0; i < 100; i++) { /* each for the subscription, many times */
        uint8_t *at = liar->in->chunk[0] + (size_t)i * length;
        struct nsn_record forged = {.length = length, .kind = NSN_RECORD_MESSAGE, .flags = NSN_RECORD_POOL,
                                    .sid_count = NSN_RECORD_SIDS, .subject_length = 4, .payload_length = sizeof payload};
        memcpy(at, &forged, sizeof forged);
        for (uint32_t sid = 0; sid < NSN_RECORD_SIDS; sid++)
            memcpy(at + sizeof forged + 4 * sid, &(uint32_t){3}, 4);
        memcpy(at + sizeof forged + 4 * NSN_RECORD_SIDS, &ref, sizeof ref);
        memcpy(at + sizeof forged + 4 * NSN_RECORD_SIDS + sizeof ref, "only", 4);
    }
    nsn_store_release(&liar->in->producer.tail, 100ull * length);
    struct nsn_counters before, after;
    nsn_session_counters(world->victim, &before);
    liar_end(liar);
    flush(world, world->victim);
    nsn_session_counters(world->victim, &after);
    CHECK(after.passed_on - before.passed_on <= 1);
    CHECK(world->victim->passing_bytes <= sizeof payload);
    new_liar(world);
}

TEST(a_dead_consumer_has_no_more_taken_back_from_its_link_than_was_in_it) { with_world(bomb); }

/* --- lies on the pages ------------------------------------------------------------------------------------------------------ */

/* How the memory at `at` is mapped, as /proc/self/maps says: "r--s". */
static void mapping_of(const void *at, char mode[5])
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    CHECK(maps);
    while (fgets(line, sizeof line, maps)) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx %4s", &from, &to, mode) == 3 && from <= (uintptr_t)at && (uintptr_t)at < to)
            break;
        mode[0] = 0;
    }
    fclose(maps);
}

static void slots_are_nsnds(struct world *world)
{
    char mode[5] = "";
    mapping_of(world->victim->map.slots, mode);
    CHECK(strcmp(mode, "r--s") == 0);
    CHECK_EQUAL(fcntl(world->victim->log.fd, F_GETFL) & O_ACCMODE, O_RDONLY);
}

TEST(a_session_cannot_write_the_table_of_slots_nor_the_log) { with_world(slots_are_nsnds); }

static void inside_for_ever(struct world *world)
{
    struct nsn_page *page = liar_page(&world->liar);
    for (int i = 0; i < 20; i++) {
        nsn_store_release(&page->publishing, nsn_now_ns());
        *liar_board(&world->liar) = (uint32_t)(2 * i + 3); /* a message is under way */
        good_says(world, 5);
        hear_the_good(world);
    }
    nsn_store_release(&page->publishing, 1);
    falls_asleep(world);
    nsn_trim(world->victim);
}

TEST(a_publish_that_never_ends_holds_others_up_for_a_moment_only) { with_world(inside_for_ever); }

static void another_publish(struct world *world)
{
    nsn_store_release(&liar_page(&world->liar)->publishing, nsn_load_relaxed(&liar_page(&world->liar)->publishing) + 1);
    *liar_board(&world->liar) = (*liar_board(&world->liar) + 2) | 1;
}

static void ever_another(struct world *world)
{
    world->meanwhile = another_publish;
    for (int i = 0; i < 20; i++) {
        good_says(world, 5);
        hear_the_good(world);
    }
    world->meanwhile = NULL;
    nsn_store_release(&liar_page(&world->liar)->publishing, 0);
}

TEST(ever_other_publishes_of_long_ago_hold_nobody_up) { with_world(ever_another); }

struct flapper {
    struct world *world;
    int kind;
    bool over;
};

/* Changes its words as fast as it can. */
static void *flap(void *argument)
{
    struct flapper *flapper = argument;
    struct liar *liar = &flapper->world->liar;
    struct nsn_page *page = liar_page(liar);
    uint32_t *board = &liar->map.places[liar->victim_slot].board[liar->slot];
    for (uint32_t number = 1; !__atomic_load_n(&flapper->over, __ATOMIC_RELAXED); number += 2) {
        nsn_store_relaxed(&page->publishing, flapper->kind == 0 ? 0 : flapper->kind == 1 ? number : nsn_now_ns() - 100000000);
        nsn_store_relaxed(&page->asleep, number);
        nsn_store_relaxed32(board, number);
    }
    return NULL;
}

static void flapping(struct world *world)
{
    static uint8_t payload[100];
    for (int kind = 0; kind < 3; kind++) {
        pthread_t thread;
        struct flapper flapper = {.world = world, .kind = kind};
        CHECK_EQUAL(pthread_create(&thread, NULL, flap, &flapper), 0);
        uint64_t until = nsn_now_ns() + 500000000ull;
        while (nsn_now_ns() < until) {
            good_says(world, 5);
            hear_the_good(world);
            victim_says(world, payload, sizeof payload);
            good_reads(world);
            IN_TIME(nsn_arm(world->victim));
            IN_TIME(nsn_disarm(world->victim));
        }
        __atomic_store_n(&flapper.over, true, __ATOMIC_RELAXED);
        pthread_join(thread, NULL);
    }
    nsn_store_release(&liar_page(&world->liar)->publishing, 0);
}

TEST(words_that_never_stand_still_hold_nobody_up) { with_world(flapping); }

static void announced_for_ever(struct world *world)
{
    uint64_t began = nsn_now_ns();
    struct liar other;
    liar_hello(&other, world->node); /* it has no link to the victim, and says that one is on its way */
    other.victim_slot = world->liar.victim_slot;
    for (uint32_t i = 0; i < 50; i++) {
        nsn_store_release32(liar_board(&other), 2 * i + 2);
        good_says(world, 5);
        hear_the_good(world);
    }
    CHECK(nsn_now_ns() - began < CALL_NS / 2 && "it is not waited for again and again");
    flush(world, world->victim);
    falls_asleep(world);
    liar_end(&other);
}

TEST(a_link_that_is_announced_and_never_comes_holds_others_up_once) { with_world(announced_for_ever); }

/* --- a node that ends at a bad moment --------------------------------------------------------------------------------------- */

static int node_end_of(struct node *node, uint32_t slot)
{
    for (int i = 0; i < NODE_SESSIONS; i++)
        if (node->sessions[i].fd >= 0 && node->sessions[i].hello && node->sessions[i].slot == slot)
            return node->sessions[i].fd;
    return -1;
}

static void node_ends_in_a_publish(struct world *world)
{
    struct nsn_session_info info, good;
    nsn_session_info(world->victim, &info);
    nsn_session_info(world->good, &good);
    struct nsn_session *late = node_session(world->node);
    CHECK(victim_says(world, "x", 1) >= 1); /* links to the good peer and the liar are there, one to the latecomer is not */
    node_subscribe(late, 1, "l", "");
    struct nsn_peer_gone gone = {{NSN_PROTOCOL_MAGIC, NSN_PEER_GONE, NSN_PROTOCOL_VERSION}, good.slot, good.generation};
    int end = node_end_of(world->node, info.slot);
    node_send(end, &gone, sizeof gone, -1);
    shutdown(end, SHUT_RDWR);
    int result = node_publish(world->victim, "l", "x", 1);
    CHECK(result >= 1 || result == -EALREADY);
    while (nsn_session_process(world->victim, 0) >= 0)
        continue;
    CHECK_EQUAL(nsn_session_state(world->victim), NSN_DETACHED);
    CHECK(node_publish(world->victim, "l", "x", 1) >= 1);
    nsn_session_close(late);
}

static void *accept_later(void *argument)
{
    struct timespec while_it_waits = {.tv_nsec = 20000000};
    nanosleep(&while_it_waits, NULL);
    return (void *)(intptr_t)accept(*(int *)argument, NULL, NULL);
}

TEST(a_session_waits_for_a_node_that_has_many_to_accept)
{
    struct node *node = node_start(); /* for its directory */
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct nsn_session_options options = {.name = "late", .application_id = 4222, .socket_path = address.sun_path};
    char error[256] = "";
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), others[2];
    snprintf(address.sun_path, sizeof address.sun_path, "%s/full", node->directory);
    CHECK_EQUAL(bind(listener, (struct sockaddr *)&address, sizeof address), 0);
    CHECK_EQUAL(listen(listener, 0), 0);
    for (int i = 0; i < 2; i++)
        others[i] = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    CHECK_EQUAL(connect(others[0], (struct sockaddr *)&address, sizeof address), 0);
    CHECK(connect(others[1], (struct sockaddr *)&address, sizeof address) < 0 && errno == EAGAIN);
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, accept_later, &listener), 0);
    struct nsn_session *session = nsn_session_open(&options, error, sizeof error);
    CHECK(session);
    CHECK(fcntl(nsn_session_control_fd(session), F_GETFL) & O_NONBLOCK);
    nsn_session_close(session);
    void *accepted;
    pthread_join(thread, &accepted);
    close((int)(intptr_t)accepted);
    close(others[0]);
    close(others[1]);
    close(listener);
    node_stop(node);
}

TEST(what_the_node_said_last_does_not_end_links_in_the_middle_of_a_publish)
{
    struct node *node = node_start();
    static struct world world;
    open_world(&world, node);
    node_ends_in_a_publish(&world);
    liar_end(&world.liar);
    nsn_session_close(world.victim);
    nsn_session_close(world.good);
    node_stop(node);
}

/* --- at random, in turns ---------------------------------------------------------------------------------------------------- */

static uint64_t plausible(uint64_t *seed, uint64_t near)
{
    static const uint64_t edges[] = {0, 1, 7, 8, 4095, 4096, 65535, 65536, UINT32_MAX, 1ull << 32, INT64_MAX, 1ull << 63, UINT64_MAX};
    switch (random_next(seed) % 4) {
    case 0: return random_next(seed);
    case 1: return edges[random_next(seed) % (sizeof edges / sizeof edges[0])];
    case 2: return near + random_next(seed) % 64 * 8;
    default: return near - random_next(seed) % 64;
    }
}

static void scribble_over(uint8_t *bytes, size_t length, uint64_t *seed)
{
    size_t at = random_next(seed) % length;
    uint64_t value = plausible(seed, bytes[at]);
    memcpy(bytes + at, &value, length - at < 8 ? length - at : 1ull << random_next(seed) % 4);
}

static void scribble_record(struct liar *liar, uint64_t *seed)
{
    if (!liar->record_count)
        return;
    uint32_t known = liar->record_count < LIAR_RECORDS ? liar->record_count : LIAR_RECORDS;
    uint32_t back = (uint32_t)(random_next(seed) % (known < 8 ? known : 8));
    uint8_t *at = liar->records[(liar->record_count - 1 - back) % LIAR_RECORDS];
    struct nsn_record *record = (struct nsn_record *)(void *)at;
    switch (random_next(seed) % 12) {
    case 0: record->length = random_next(seed) % 2 ? NSN_RECORD_SKIP : (uint32_t)plausible(seed, record->length); break;
    case 1: record->kind = (uint8_t)random_next(seed); break;
    case 2: record->flags ^= (uint8_t)(1u << random_next(seed) % 8); break;
    case 3: record->sid_count = (uint16_t)plausible(seed, record->sid_count); break;
    case 4: record->subject_length = (uint16_t)plausible(seed, record->subject_length); break;
    case 5: record->reply_length = (uint16_t)plausible(seed, record->reply_length); break;
    case 6: record->header_length = (uint32_t)plausible(seed, record->header_length); break;
    case 7: record->payload_length = plausible(seed, record->payload_length); break;
    case 8: record->stamp = plausible(seed, record->stamp); break;
    case 9: { /* sids: known ones, and others */
        uint32_t *sids = (uint32_t *)(void *)(record + 1);
        sids[random_next(seed) % 4] = (uint32_t)(random_next(seed) % 5);
        break;
    }
    case 10: scribble_over((uint8_t *)(record + 1), sizeof(struct nsn_pool_ref) + 8, seed); break;
    default: scribble_over(at, 128, seed);
    }
}

static void scribble_as_producer(struct liar *liar, uint64_t *seed)
{
    struct nsn_link_producer_words *words = &liar->file->producer;
    uint64_t tail = nsn_load_relaxed(&words->tail);
    uint64_t *word[] = {&words->tail, &words->want, &words->want_either, &words->want_consumed, &words->want_released, &words->stall,
                        &words->dropped, &words->reaped};
    switch (random_next(seed) % 10) {
    case 0: nsn_store_release(&words->tail, plausible(seed, tail)); break;
    case 1: nsn_store_release(word[random_next(seed) % 8], plausible(seed, tail)); break;
    case 2: words->map[random_next(seed) % 4] = (uint16_t)(random_next(seed) % 4 ? random_next(seed) % 4 : random_next(seed)); break;
    case 3: scribble_over((uint8_t *)words, 4096, seed); break;
    case 4: scribble_over(liar->file->chunk[random_next(seed) % 3], NSN_LINK_CHUNK, seed); break;
    case 5: scribble_over((uint8_t *)&liar->file->consumer, sizeof liar->file->consumer, seed); break;
    default: scribble_record(liar, seed);
    }
}

static void scribble_as_consumer(struct liar *liar, uint64_t *seed)
{
    if (!liar->in)
        return;
    struct nsn_link_consumer_words *words = &liar->in->consumer;
    uint64_t tail = nsn_load_relaxed(&liar->in->producer.tail);
    uint64_t *word[] = {&words->head, &words->consumed, &words->taken, &words->trim, &words->trimmed, &words->stall_acknowledged};
    switch (random_next(seed) % 8) {
    case 0: nsn_store_release(word[random_next(seed) % 6], plausible(seed, tail)); break;
    case 1: nsn_store_release(word[2 + random_next(seed) % 4], random_next(seed) % 4); break;
    case 2:
    case 3: nsn_store_release32(&words->released[random_next(seed) % 8], (uint32_t)(random_next(seed) % 8)); break;
    case 4: scribble_over((uint8_t *)words, sizeof *words, seed); break;
    case 5: scribble_over((uint8_t *)&liar->in->producer, 4096, seed); break;
    case 6: scribble_over(liar->in->chunk[random_next(seed) % 3], NSN_LINK_CHUNK, seed); break;
    default: /* honest for once */
        nsn_store_relaxed(&words->consumed, plausible(seed, nsn_load_relaxed(&words->consumed)));
        nsn_store_release(&words->head, tail);
    }
}

/* Only its own words, unless `everywhere`: then those of all sessions, and everybody's order and wake-ups are gone. */
static void scribble_pages(struct liar *liar, uint64_t *seed, bool everywhere)
{
    struct nsn_page *page = liar_page(liar);
    if (everywhere) {
        struct nsn_place *place = &liar->map.places[random_next(seed) % 4];
        if (random_next(seed) % 2)
            scribble_over((uint8_t *)&place->page, 4096, seed);
        else
            nsn_store_release32(&place->board[random_next(seed) % 4], (uint32_t)plausible(seed, 2));
        return;
    }
    switch (random_next(seed) % 4) {
    case 0: nsn_store_release(&page->publishing, plausible(seed, nsn_now_ns())); break;
    case 1: nsn_store_release(&page->asleep, plausible(seed, 1)); break;
    case 2: scribble_over((uint8_t *)page, 4096, seed); break;
    default: nsn_store_release32(liar_board(liar), (uint32_t)plausible(seed, nsn_link_out_tail32(liar->out) * 2u)); break;
    }
}

static void say_gone(struct liar *liar)
{
    uint32_t length = sizeof(struct nsn_record) + sizeof(struct nsn_pool_ref);
    struct nsn_record record = {.length = length, .kind = NSN_RECORD_SEGMENT_GONE, .flags = NSN_RECORD_POOL, .stamp = nsn_now_ns()};
    struct nsn_pool_ref ref = {.segment = liar->block->segment};
    if (nsn_link_out_room(liar->out, length, 0) != 1)
        return;
    uint8_t *at = nsn_link_out_reserve(liar->out, length);
    memcpy(at, &record, sizeof record);
    memcpy(at + sizeof record, &ref, sizeof ref);
    liar_commit(liar);
}

static void write_honestly(struct liar *liar, uint64_t *seed)
{
    static const char *subjects[] = {"v", "v.a", "q", "unknown.subject"};
    for (uint64_t count = 1 + random_next(seed) % 12; count; count--) {
        struct liar_record wanted = {.sid_count = 1 + (uint32_t)(random_next(seed) % 3), .pool = random_next(seed) % 4 == 0,
                                     .subject = subjects[random_next(seed) % 4], .reply = random_next(seed) % 2 ? "reply" : NULL};
        wanted.payload_length = random_next(seed) % 8 ? (uint32_t)(random_next(seed) % 200) : (uint32_t)(random_next(seed) % 8000);
        wanted.payload_length += wanted.pool;
        for (uint32_t i = 0; i < wanted.sid_count; i++)
            wanted.sids[i] = 1 + i;
        if (!liar_reserve(liar, &wanted))
            return;
        liar_commit(liar);
        if (random_next(seed) % 64 == 0)
            say_gone(liar);
    }
}

/* One thing that the victim does. */
static void act(struct world *world, uint64_t *seed)
{
    static uint8_t payload[200000];
    struct nsn_session *victim = world->victim;
    struct nsn_event event;
    struct nsn_buffer_out buffer;
    size_t length = random_next(seed) % 4 ? random_next(seed) % 1000 : random_next(seed) % sizeof payload;
    switch (random_next(seed) % 14) {
    case 0:
    case 1:
        if (victim_says(world, payload, length) == -EAGAIN && random_next(seed) % 4 == 0)
            IN_TIME(nsn_publish_give_up(victim));
        break;
    case 2:
        if (nsn_buffer_take(victim, length, &buffer) == 0 &&
            nsn_publish_buffer(victim, "l", 1, "", 0, &buffer, length) == -EAGAIN)
            nsn_buffer_drop(victim, &buffer);
        break;
    case 3: IN_TIME(nsn_trim(victim)); break;
    case 4: {
        int token = nsn_barrier_begin(victim);
        for (int i = 0; i < 3 && nsn_barrier_done(victim, token) == 0; i++)
            turn(world);
        nsn_barrier_cancel(victim, token);
        break;
    }
    case 5:
        if (nsn_arm(victim))
            nsn_disarm(victim);
        break;
    case 6: release_all(world); break;
    case 7:
        while (nsn_next_event(victim, &event))
            CHECK(memchr(event.text, 0, sizeof event.text));
        break;
    case 8: nsn_space(victim); break;
    case 9:
        nsn_unsubscribe(victim, 3, random_next(seed) % 4);
        break;
    case 10: nsn_subscribe(victim, 3, "q", 1, "g", 1); break;
    case 11: good_reads(world); break;
    case 12: good_says(world, 3); break;
    default: turn(world);
    }
}

/* A new link, by the shortest way. */
static void link_at_once(struct world *world)
{
    struct liar *liar = &world->liar;
    struct nsn_session *victim = world->victim;
    uint32_t index;
    uint64_t size;
    int segment, fd = liar_make_link(liar);
    CHECK_EQUAL(nsn_pool_segment(liar->pool, liar->block->segment, &index, &segment, &size), 0);
    pthread_mutex_lock(&victim->lock);
    nsn_in_link(victim, liar->slot, liar->generation, getuid(), liar->link_ids, fd);
    nsn_in_segment(victim, liar->slot, liar->generation, liar->block->segment, size, segment);
    pthread_mutex_unlock(&victim->lock);
    close(fd);
}

static void lie_in_turns(struct world *world, uint64_t seed, bool everywhere)
{
    struct liar *liar = &world->liar;
    if (random_next(&seed) % 16 == 0) { /* what the last one left of its links is taken back */
        liar_end(liar);
        new_liar(world);
    }
    for (int round = 0; round < 6; round++) {
        write_honestly(liar, &seed);
        liar_take(liar);
        for (uint64_t count = random_next(&seed) % 5; count; count--)
            switch (random_next(&seed) % 4) {
            case 0: scribble_as_consumer(liar, &seed); break;
            case 1: scribble_pages(liar, &seed, everywhere); break;
            default: scribble_as_producer(liar, &seed);
            }
        if (random_next(&seed) % 8)
            nsn_store_release32(liar_board(liar), nsn_load_relaxed32(liar_board(liar)) + 2);
        for (uint64_t count = 1 + random_next(&seed) % 4; count; count--)
            act(world, &seed);
        if (random_next(&seed) % 6 == 0)
            link_at_once(world);
    }
}

/* Runs seeds for a while, or up to the one that was asked for, from where its world begins. */
static void run_seeds(const char *name, double seconds, bool heard, void (*run)(struct world *world, uint64_t seed))
{
    static struct world world;
    const char *asked = getenv("NSN_SEED");
    uint64_t until = nsn_now_ns() + seconds_ns(seconds), last = asked ? strtoull(asked, NULL, 0) : UINT64_MAX;
    uint64_t first = asked ? last - (last - 1) % WORLD_SEEDS : 1;
    struct node *node = node_start();
    doing = name;
    for (doing_seed = first; doing_seed <= last && (asked || nsn_now_ns() < until); doing_seed++) {
        alarm(STUCK_S);
        if ((doing_seed - 1) % WORLD_SEEDS == 0)
            open_world(&world, node);
        else
            link_at_once(&world);
        run(&world, doing_seed * 0x9e3779b97f4a7c15ull);
        if (heard) {
            good_says(&world, 3);
            hear_the_good(&world);
        }
        if (doing_seed % WORLD_SEEDS == 0)
            close_world(&world, heard);
    }
    if ((doing_seed - 1) % WORLD_SEEDS)
        close_world(&world, heard);
    alarm(0);
    doing = NULL;
    node_stop(node);
    printf("   %llu seeds\n", (unsigned long long)(doing_seed - first));
}

static void in_turns(struct world *world, uint64_t seed) { lie_in_turns(world, seed, false); }

TEST(a_peer_that_writes_anything_does_no_harm) { run_seeds("turns", 8, true, in_turns); }

/* The good peer's words are lied about as well: nothing is promised but that the victim lives, and returns. */
static void everywhere(struct world *world, uint64_t seed) { lie_in_turns(world, seed, true); }

TEST(a_peer_that_writes_into_everybodys_page_does_not_kill_anybody) { run_seeds("everywhere", 3, false, everywhere); }

/* --- at random, at full speed ------------------------------------------------------------------------------------------------ */

struct scribbler {
    struct world *world;
    uint64_t seed;
    bool over;
};

static void *scribble(void *argument)
{
    struct scribbler *scribbler = argument;
    uint64_t seed = scribbler->seed;
    struct liar *liar = &scribbler->world->liar;
    while (!__atomic_load_n(&scribbler->over, __ATOMIC_RELAXED)) {
        uint64_t kind = random_next(&seed) % 8;
        if (kind == 0)
            scribble_pages(liar, &seed, false);
        else if (kind == 1)
            scribble_as_producer(liar, &seed);
        else if (kind < 5)
            scribble_record(liar, &seed);
        else
            scribble_as_consumer(liar, &seed);
        nsn_store_release32(liar_board(liar), nsn_load_relaxed32(liar_board(liar)) + 2);
    }
    return NULL;
}

static void at_full_speed(struct world *world, uint64_t seed)
{
    for (int i = 0; i < 8; i++)
        write_honestly(&world->liar, &seed);
    act(world, &seed);
    liar_take(&world->liar);
    struct scribbler scribbler = {.world = world, .seed = random_next(&seed)};
    pthread_t thread;
    CHECK_EQUAL(pthread_create(&thread, NULL, scribble, &scribbler), 0);
    uint64_t until = nsn_now_ns() + 1000000;
    for (int i = 0; i < 20 || nsn_now_ns() < until; i++)
        act(world, &seed);
    __atomic_store_n(&scribbler.over, true, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
}

TEST(a_peer_that_writes_anything_while_it_is_read_does_no_harm) { run_seeds("full speed", 6, true, at_full_speed); }

CHECK_MAIN()
