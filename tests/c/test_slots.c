/* The table of sessions: who gets which slot, what outlives nsnd, and what a session can and cannot do with the files. */
#include <signal.h>
#include <sys/mman.h>

#include "nsn_slots.h"
#include "scratch.h"

static char error[256];

static struct nsn_slots *open_slots(void)
{
    struct nsn_slots *slots = NULL;
    int result = nsn_slots_open(&slots, scratch, error, sizeof(error));
    if (result)
        fprintf(stderr, "%s\n", error);
    CHECK_EQUAL(result, 0);
    return slots;
}

static int claim(struct nsn_slots *slots, uint64_t identity, uint32_t *generation)
{
    return nsn_slots_claim(slots, (uint64_t[2]){identity, ~identity}, 100, 200, 300, generation);
}

static int find(const struct nsn_slots *slots, uint64_t identity)
{
    return nsn_slots_find(slots, (uint64_t[2]){identity, ~identity});
}

TEST(lowest_free_slot_is_given_with_a_new_generation)
{
    uint32_t generation;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    for (int i = 0; i < 3; i++) {
        CHECK_EQUAL(claim(slots, (uint64_t)i, &generation), i);
        CHECK_EQUAL(generation, 1);
    }
    CHECK_EQUAL(nsn_slots_view(slots)->highest, 3);
    nsn_slots_free_slot(slots, 1);
    CHECK_EQUAL(nsn_slots_view(slots)->slot[1].alive, 0);
    CHECK_EQUAL(find(slots, 1), -ENOENT);
    CHECK_EQUAL(find(slots, 2), 2);
    CHECK_EQUAL(claim(slots, 7, &generation), 1);
    CHECK_EQUAL(generation, 2);
    CHECK_EQUAL(find(slots, 7), 1);
    const struct nsn_slot *slot = &nsn_slots_view(slots)->slot[1];
    CHECK(slot->alive == 2 && slot->generation == 2 && slot->identity[0] == 7 && slot->identity[1] == ~7ull);
    CHECK(slot->pid == 100 && slot->start_time == 200 && slot->uid == 300 && slot->acknowledged == 0);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(generation_is_never_zero)
{
    uint32_t generation;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    nsn_slots_close(slots);
    int fd = scratch_open("slots", O_RDWR);
    uint64_t last = UINT32_MAX, one = 1;
    CHECK(pwrite(fd, &last, 8, 4096 + offsetof(struct nsn_slot, generation)) == 8);
    CHECK(pwrite(fd, &one, 8, offsetof(struct nsn_slots_file, highest)) == 8);
    close(fd);
    slots = open_slots();
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    CHECK_EQUAL(generation, 1);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(place_is_zeroed_when_it_is_given_again)
{
    uint32_t generation;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    CHECK_EQUAL(claim(slots, 2, &generation), 1);
    struct nsn_place *place = nsn_slots_place(slots, 0), *next = nsn_slots_place(slots, 1);
    place->page.publishing = 5, place->page.asleep = 7, place->board[4095] = 9, place->board[0] = 1;
    next->page.publishing = 6, next->board[0] = 3;
    nsn_slots_free_slot(slots, 0);
    CHECK_EQUAL(claim(slots, 3, &generation), 0);
    CHECK(place->page.publishing == 0 && place->page.asleep == 0 && place->board[4095] == 0 && place->board[0] == 0);
    CHECK(next->page.publishing == 6 && next->board[0] == 3);
    CHECK(nsn_slots_place(slots, NSN_SLOTS_MAX) == NULL);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(next_nsnd_carries_on_what_it_finds)
{
    uint32_t generation;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    claim(slots, 1, &generation), claim(slots, 2, &generation), claim(slots, 3, &generation);
    nsn_slots_acknowledge(slots, 2, 44);
    nsn_slots_free_slot(slots, 1);
    nsn_slots_place(slots, 2)->page.asleep = 13;
    nsn_slots_close(slots);
    slots = open_slots();
    CHECK(find(slots, 1) == 0 && find(slots, 2) == -ENOENT && find(slots, 3) == 2);
    CHECK_EQUAL(nsn_slots_view(slots)->slot[2].acknowledged, 44);
    CHECK_EQUAL(nsn_slots_place(slots, 2)->page.asleep, 13);
    CHECK_EQUAL(claim(slots, 9, &generation), 1);
    CHECK_EQUAL(generation, 2);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(session_sees_the_table_and_writes_its_page)
{
    uint32_t generation;
    struct nsn_slots_map map;
    scratch_make();
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -ENOENT);
    CHECK(strstr(error, "slots"));
    struct nsn_slots *slots = open_slots();
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), 0);
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    CHECK_EQUAL(map.slots->slot[0].alive, generation);
    CHECK_EQUAL(map.slots->highest, 1);
    nsn_slots_acknowledge(slots, 0, 5);
    CHECK_EQUAL(map.slots->slot[0].acknowledged, 5);
    map.places[0].page.counters.messages_out = 8;
    CHECK_EQUAL(nsn_slots_place(slots, 0)->page.counters.messages_out, 8);
    nsn_slots_unmap(&map);
    CHECK(map.slots == NULL && map.places == NULL);
    nsn_slots_unmap(&map);
    nsn_slots_close(slots);
    scratch_remove();
}

/* How a child that runs this ends: 0, or the signal. */
static int end_of_child(void (*run)(struct nsn_slots_map *), struct nsn_slots_map *map)
{
    fflush(stdout);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); /* sanitizers catch it otherwise */
        signal(SIGBUS, SIG_DFL);
        run(map);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static void map_and_write_slots(struct nsn_slots_map *map)
{
    if (nsn_slots_map(map, scratch, false, error, sizeof(error)) == 0)
        *(volatile uint64_t *)&((struct nsn_slots_file *)map->slots)->slot[0].alive = 0;
}

static void use_inherited_map(struct nsn_slots_map *map) { *(volatile uint64_t *)&map->places[0].page.asleep = 1; }

TEST(session_cannot_write_the_table_nor_a_forked_child_use_the_map)
{
    struct nsn_slots_map map;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    CHECK_EQUAL(end_of_child(map_and_write_slots, &map), SIGSEGV);
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), 0);
    CHECK_EQUAL(end_of_child(use_inherited_map, &map), SIGSEGV);
    nsn_slots_unmap(&map);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(files_are_written_by_the_owner_alone)
{
    struct stat status;
    scratch_make();
    nsn_slots_close(open_slots());
    const char *names[] = {"slots", "pages"};
    for (int i = 0; i < 2; i++) {
        int fd = scratch_open(names[i], O_RDONLY);
        CHECK(fstat(fd, &status) == 0);
        CHECK_EQUAL(status.st_mode & 07777, 0644);
        close(fd);
    }
    CHECK(status.st_blocks * 512 <= 65536); /* pages are sparse */
    scratch_remove();
}

static int try_open(void)
{
    struct nsn_slots *slots;
    *error = '\0';
    int result = nsn_slots_open(&slots, scratch, error, sizeof(error));
    CHECK(result == 0 || *error);
    if (!result)
        nsn_slots_close(slots);
    return result;
}

static void put(const char *name, const void *bytes, size_t length, off_t at)
{
    int fd = scratch_open(name, O_RDWR);
    CHECK(fd >= 0 && pwrite(fd, bytes, length, at) == (ssize_t)length);
    close(fd);
}

TEST(files_of_another_kind_are_refused_in_words)
{
    struct nsn_slots_map map;
    uint64_t magic = NSN_SLOTS_MAGIC, wrong = 1;
    uint32_t version = NSN_SLOTS_VERSION, other = 99;
    scratch_make();
    CHECK_EQUAL(try_open(), 0);
    put("slots", &wrong, 8, 0);
    CHECK_EQUAL(try_open(), -EPROTO);
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -EPROTO);
    put("slots", &magic, 8, 0);
    put("slots", &other, 4, 8);
    CHECK_EQUAL(try_open(), -EPROTONOSUPPORT);
    CHECK(strstr(error, "version 99"));
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -EPROTONOSUPPORT);
    put("slots", &version, 4, 8);
    put("slots", &wrong, 8, 4096 + offsetof(struct nsn_slot, alive)); /* alive, above the highest */
    CHECK_EQUAL(try_open(), -EPROTO);
    scratch_make();
    CHECK_EQUAL(try_open(), 0);
    int fd = scratch_open("pages", O_RDWR);
    CHECK(ftruncate(fd, 4096) == 0);
    close(fd);
    CHECK_EQUAL(try_open(), -EPROTO);
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -EPROTO);
    scratch_remove();
}

TEST(file_of_another_user_is_refused)
{
    char path[128];
    scratch_make();
    CHECK_EQUAL(try_open(), 0);
    snprintf(path, sizeof(path), "%s/pages", scratch);
    if (chown(path, 12345, 12345)) {
        printf("skipped: only root gives files away\n");
    } else {
        CHECK_EQUAL(try_open(), -EACCES);
        CHECK(strstr(error, "12345"));
    }
    scratch_remove();
}

TEST(symbolic_link_is_not_followed)
{
    char path[128], target[128];
    scratch_make();
    CHECK_EQUAL(try_open(), 0);
    snprintf(path, sizeof(path), "%s/slots", scratch);
    snprintf(target, sizeof(target), "%s/elsewhere", scratch);
    CHECK(rename(path, target) == 0 && symlink(target, path) == 0);
    CHECK_EQUAL(try_open(), -ELOOP);
    scratch_remove();
}

TEST(death_while_the_files_are_made_leaves_nothing_in_the_way)
{
    scratch_make();
    int fd = scratch_open("pages.new", O_RDWR | O_CREAT);
    close(fd);
    fd = scratch_open("pages", O_RDWR | O_CREAT);
    close(fd);
    fd = scratch_open("slots.new", O_RDWR | O_CREAT);
    close(fd);
    uint32_t generation;
    struct nsn_slots *slots = open_slots();
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    CHECK(!scratch_has("pages.new") && !scratch_has("slots.new"));
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(no_slot_is_left_when_all_are_taken)
{
    uint32_t generation;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    for (int i = 0; i < NSN_SLOTS_MAX; i++)
        CHECK_EQUAL(claim(slots, (uint64_t)i, &generation), i);
    CHECK_EQUAL(claim(slots, 1u << 20, &generation), -ENOSPC);
    nsn_slots_free_slot(slots, 4000);
    CHECK_EQUAL(claim(slots, 1u << 20, &generation), 4000);
    nsn_slots_close(slots);
    scratch_remove();
}

static void claim_on_a_full_file_system(void)
{
    uint32_t generation;
    struct nsn_slots *slots = open_slots();
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    scratch_fill();
    CHECK_EQUAL(claim(slots, 2, &generation), -ENOSPC);
    memset(nsn_slots_place(slots, 0), 1, sizeof(struct nsn_place)); /* what was given has memory */
    CHECK_EQUAL(find(slots, 2), -ENOENT);
    scratch_empty();
    CHECK_EQUAL(claim(slots, 2, &generation), 1);
    nsn_slots_close(slots);
}

TEST(full_file_system_is_an_error_and_not_a_signal) { scratch_small(1024, claim_on_a_full_file_system); }

static void open_on_a_full_file_system(void)
{
    scratch_fill();
    CHECK_EQUAL(try_open(), -ENOSPC);
    CHECK(!scratch_has("slots"));
    scratch_empty();
    CHECK_EQUAL(try_open(), 0);
}

TEST(files_that_find_no_room_are_not_left_half_made) { scratch_small(1024, open_on_a_full_file_system); }

CHECK_MAIN()
