/* Peers that write anything into any byte that they can: in turns with the victim, and while it runs at full speed.
 *
 * A failing seed is printed; NSN_SEED=number runs that one alone. NSN_SECONDS: how long each random test lasts. */
#include "lies_world.h"

#define WORLD_SEEDS 64u /* seeds that share one victim, one after the other */

static uint64_t seconds_ns(double by_default)
{
    const char *given = getenv("NSN_SECONDS");
    double factor = __sanitizer_set_death_callback ? 1 : 0.25; /* it is the sanitizers that see harm */
    return (uint64_t)((given ? strtod(given, NULL) : by_default * factor) * 1e9);
}

/* --- at random, in turns -------------------------------------------------------------------------------------------------- */

static uint64_t plausible(uint64_t *seed, uint64_t near)
{
    static const uint64_t edges[] = {0, 1, 7, 8, 4095, 4096, 65535, 65536, UINT32_MAX, 1ull << 32, INT64_MAX, 1ull << 63,
                                     UINT64_MAX};
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
    uint64_t *word[] = {&words->tail, &words->want, &words->want_either, &words->want_consumed, &words->want_released,
                        &words->stall,
                        &words->dropped, &words->reaped};
    switch (random_next(seed) % 10) {
    case 0: nsn_store_release(&words->tail, plausible(seed, tail)); break;
    case 1: nsn_store_release(word[random_next(seed) % 8], plausible(seed, tail)); break;
    case 2: words->map[random_next(seed) % 4] = (uint16_t)(random_next(seed) % (random_next(seed) % 4 ? 4 : UINT64_MAX));
        break;
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
    uint64_t *word[] = {&words->head, &words->consumed, &words->taken, &words->trim, &words->trimmed,
                        &words->stall_acknowledged};
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
    struct nsn_record record = {.length = length, .kind = NSN_RECORD_SEGMENT_GONE, .flags = NSN_RECORD_POOL,
                                .stamp = nsn_now_ns()};
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
                                     .subject = subjects[random_next(seed) % 4],
                                     .reply = random_next(seed) % 2 ? "reply" : NULL};
        bool small = random_next(seed) % 8;
        wanted.payload_length = (uint32_t)(random_next(seed) % (small ? 200 : 8000));
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

/* --- at random, at full speed --------------------------------------------------------------------------------------------- */

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
