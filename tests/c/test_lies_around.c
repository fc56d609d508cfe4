/* Lies around the links: descriptors that are none, the words of pages and boards; and a node that ends at a bad moment. */
#include "lies_world.h"

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
    hand_over_and_check(world, "may shrink",
                        link_file(MAGIC, NSN_LINK_VERSION, NSN_LINK_CHUNKS, *id + 1, F_SEAL_GROW | F_SEAL_SEAL));
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

/* --- lies on the pages ---------------------------------------------------------------------------------------------------- */

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

/* --- a node that ends at a bad moment ------------------------------------------------------------------------------------- */

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

CHECK_MAIN()
