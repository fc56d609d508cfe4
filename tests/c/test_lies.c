/* Peers that lie by intent: each word that a producer or a consumer can write into a link. */
#include "lies_world.h"

#define SEGMENT_SIZE (1u << 20)

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

/* --- lies of a consumer, by intent ---------------------------------------------------------------------------------------- */

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
            munmap(world->liar.in, sizeof *world->liar.in);
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

CHECK_MAIN()
