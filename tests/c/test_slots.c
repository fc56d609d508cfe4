/* The table of sessions: who gets which slot, what outlives nsnd and for how long, and what a session can and cannot do. */
#include <sys/shm.h>

#include "child.h"
#include "nsn_segment.h"
#include "nsn_slots.h"
#include "scratch.h"
#include "users.h"

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

/* The table, to be written behind its nsnd's back. */
static struct nsn_slots_file *table_of(struct nsn_slots *slots)
{
    return (struct nsn_slots_file *)(uintptr_t)nsn_slots_view(slots);
}

/* As a session has both: they outlive the nsnd, and go with the session. */
static struct nsn_slots_map map_slots(void)
{
    struct nsn_slots_map map;
    int result = nsn_slots_map(&map, scratch, false, error, sizeof(error));
    if (result)
        fprintf(stderr, "%s\n", error);
    CHECK_EQUAL(result, 0);
    return map;
}

TEST(generation_is_never_zero)
{
    uint32_t generation;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    struct nsn_slots_map map = map_slots();
    table_of(slots)->slot[0].generation = UINT32_MAX;
    table_of(slots)->highest = 1;
    nsn_slots_close(slots);
    slots = open_slots();
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    CHECK_EQUAL(generation, 1);
    nsn_slots_unmap(&map);
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
    struct nsn_slots_map map = map_slots();
    nsn_slots_close(slots);
    slots = open_slots();
    CHECK(find(slots, 1) == 0 && find(slots, 2) == -ENOENT && find(slots, 3) == 2);
    CHECK_EQUAL(nsn_slots_view(slots)->slot[2].acknowledged, 44);
    CHECK_EQUAL(nsn_slots_place(slots, 2)->page.asleep, 13);
    CHECK_EQUAL(claim(slots, 9, &generation), 1);
    CHECK_EQUAL(generation, 2);
    CHECK(map.slots->slot[1].alive == 2);
    nsn_slots_unmap(&map);
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

static void map_and_write_slots(void *context)
{
    struct nsn_slots_map *map = context;
    if (nsn_slots_map(map, scratch, false, error, sizeof(error)) == 0)
        *(volatile uint64_t *)&((struct nsn_slots_file *)map->slots)->slot[0].alive = 0;
}

static void use_inherited_map(void *context)
{
    *(volatile uint64_t *)&((struct nsn_slots_map *)context)->places[0].page.asleep = 1;
}

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

/* What the file says: its segment. */
static int32_t said_segment(void)
{
    char text[128] = "";
    unsigned version;
    int32_t segment;
    int fd = scratch_open("slots", O_RDONLY);
    CHECK(fd >= 0 && read(fd, text, sizeof text - 1) > 0);
    close(fd);
    CHECK(sscanf(text, "insane_nats slots %u segment %d token ", &version, &segment) == 2);
    CHECK_EQUAL(version, NSN_SLOTS_VERSION);
    return segment;
}

static void say(const char *text)
{
    int fd = scratch_open("slots", O_WRONLY | O_TRUNC | O_CREAT);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

static unsigned mode_of(int32_t segment)
{
    struct shmid_ds status;
    CHECK(shmctl(segment, IPC_STAT, &status) == 0);
    return status.shm_perm.mode & 0777u;
}

TEST(both_go_with_the_last_who_has_them_and_the_next_nsnd_starts_anew)
{
    uint32_t generation;
    struct shmid_ds status;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    int32_t table = said_segment(), places = nsn_slots_view(slots)->places;
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    struct nsn_slots_map map = map_slots();
    nsn_slots_close(slots);
    CHECK(shmctl(table, IPC_STAT, &status) == 0 && shmctl(places, IPC_STAT, &status) == 0);
    nsn_slots_unmap(&map);
    CHECK(shmctl(table, IPC_STAT, &status) < 0 && shmctl(places, IPC_STAT, &status) < 0);
    CHECK(nsn_segment_gone(nsn_slots_map(&map, scratch, false, error, sizeof(error))));
    CHECK(strstr(error, "is not there"));
    slots = open_slots();
    CHECK(said_segment() != table);
    CHECK_EQUAL(find(slots, 1), -ENOENT);
    CHECK_EQUAL(nsn_slots_view(slots)->highest, 0);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(both_are_for_their_user_alone_unless_they_are_shared)
{
    struct stat status;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    int32_t table = said_segment(), places = nsn_slots_view(slots)->places;
    CHECK(mode_of(table) == 0600 && mode_of(places) == 0600);
    CHECK_EQUAL(nsn_slots_share(slots, true), 0);
    CHECK(mode_of(table) == 0644 && mode_of(places) == 0644);
    struct nsn_slots_map map = map_slots();
    nsn_slots_close(slots);
    slots = open_slots();
    CHECK_EQUAL(nsn_slots_share(slots, false), 0);
    CHECK(mode_of(table) == 0600 && mode_of(places) == 0600);
    int fd = scratch_open("slots", O_RDONLY);
    CHECK(fstat(fd, &status) == 0 && (status.st_mode & 07777) == 0644);
    close(fd);
    nsn_slots_unmap(&map);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(file_that_is_cut_or_removed_harms_nobody_who_is_there)
{
    struct nsn_slots_map late;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    struct nsn_slots_map map = map_slots();
    say("");
    uint32_t generation;
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    map.places[0].page.asleep = 5;
    CHECK_EQUAL(nsn_slots_place(slots, 0)->page.asleep, 5);
    CHECK_EQUAL(nsn_slots_map(&late, scratch, false, error, sizeof(error)), -EPROTO);
    CHECK(strstr(error, "where the table of sessions is"));
    nsn_slots_unmap(&map);
    nsn_slots_close(slots);
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

TEST(what_is_not_this_table_is_refused_in_words)
{
    struct nsn_slots_map map;
    char text[128];
    scratch_make();
    struct nsn_slots *slots = open_slots();
    int32_t table = said_segment();
    snprintf(text, sizeof text, "insane_nats slots 99 segment %d token %032x\n", table, 1);
    say(text);
    CHECK_EQUAL(try_open(), -EPROTONOSUPPORT);
    CHECK(strstr(error, "version 99"));
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -EPROTONOSUPPORT);
    say("insane_nats slots 3 segment x");
    CHECK_EQUAL(try_open(), -EPROTO);
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -EPROTO);
    snprintf(text, sizeof text, "insane_nats slots %d segment %d token %032x\n", NSN_SLOTS_VERSION, table, 1);
    say(text); /* its number means another segment by now */
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -EIDRM);
    CHECK_EQUAL(try_open(), 0);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(number_that_means_another_segment_by_now_is_not_taken_for_the_table)
{
    struct nsn_slots_map map;
    char text[128];
    scratch_make();
    int other = shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600);
    snprintf(text, sizeof text, "insane_nats slots %d segment %d token %032x\n", NSN_SLOTS_VERSION, other, 1);
    say(text);
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -EPROTO);
    CHECK(strstr(error, "4096 bytes"));
    CHECK_EQUAL(try_open(), 0);
    CHECK(said_segment() != other);
    shmctl(other, IPC_RMID, NULL);
    scratch_remove();
}

TEST(number_that_means_another_users_segment_by_now_is_not_taken_for_the_table)
{
    char text[128];
    if (!users_possible())
        return;
    scratch_make();
    CHECK(chmod(scratch, 0777) == 0);
    int other = shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600);
    users_be(ALICE);
    snprintf(text, sizeof text, "insane_nats slots %d segment %d token %032x\n", NSN_SLOTS_VERSION, other, 1);
    say(text);
    struct nsn_slots_map map;
    CHECK_EQUAL(nsn_slots_map(&map, scratch, false, error, sizeof(error)), -EACCES);
    CHECK(strstr(error, "closed to this user"));
    CHECK_EQUAL(try_open(), 0);
    users_be(0);
    shmctl(other, IPC_RMID, NULL);
    scratch_remove();
}

TEST(broken_table_is_refused_in_words)
{
    scratch_make();
    struct nsn_slots *slots = open_slots();
    table_of(slots)->slot[0].alive = 1; /* above the highest */
    CHECK_EQUAL(try_open(), -EPROTO);
    CHECK(strstr(error, "slot 0 is broken"));
    table_of(slots)->slot[0].alive = 0;
    table_of(slots)->highest = NSN_SLOTS_MAX + 1;
    CHECK_EQUAL(try_open(), -EPROTO);
    nsn_slots_close(slots);
    scratch_remove();
}

TEST(file_of_another_user_is_refused)
{
    char path[128];
    scratch_make();
    CHECK_EQUAL(try_open(), 0);
    snprintf(path, sizeof(path), "%s/slots", scratch);
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

TEST(death_while_the_file_is_made_leaves_nothing_in_the_way)
{
    scratch_make();
    close(scratch_open("slots.new", O_RDWR | O_CREAT));
    uint32_t generation;
    struct nsn_slots *slots = open_slots();
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    CHECK(!scratch_has("slots.new"));
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

static void open_on_a_full_file_system(void)
{
    uint32_t generation;
    scratch_fill();
    CHECK_EQUAL(try_open(), -ENOSPC);
    CHECK(!scratch_has("slots") && !scratch_has("slots.new"));
    scratch_empty();
    struct nsn_slots *slots = open_slots();
    scratch_fill(); /* sessions take no room in it */
    CHECK_EQUAL(claim(slots, 1, &generation), 0);
    CHECK_EQUAL(claim(slots, 2, &generation), 1);
    nsn_slots_close(slots);
}

TEST(full_file_system_is_an_error_when_nsnd_starts_and_of_no_account_later) { scratch_small(1024, open_on_a_full_file_system); }

/* In an IPC namespace of its own. */
static void open_where_no_segment_is_left(void *context)
{
    struct nsn_slots_map *map = context;
    if (unshare(CLONE_NEWIPC)) {
        printf("skipped: no IPC namespace of its own: %s\n", strerror(errno));
        fflush(stdout);
        return;
    }
    CHECK(nsn_segment_gone(nsn_slots_map(map, scratch, false, error, sizeof(error))));
    CHECK(strstr(error, "are both in one IPC namespace?"));
    CHECK(scratch_write("/proc/sys/kernel/shmmni", "1"));
    scratch_make();
    CHECK_EQUAL(try_open(), -ENOSPC);
    CHECK(strstr(error, "kernel.shmmni"));
    CHECK(scratch_write("/proc/sys/kernel/shmmni", "4096") && scratch_write("/proc/sys/kernel/shmmax", "65536"));
    CHECK_EQUAL(try_open(), -EINVAL);
    CHECK(strstr(error, "kernel.shmmax"));
    scratch_remove();
}

TEST(another_ipc_namespace_and_its_limits_are_errors_that_name_them)
{
    struct nsn_slots_map map;
    if (!users_possible())
        return;
    scratch_make();
    struct nsn_slots *slots = open_slots();
    CHECK_EQUAL(end_of_child(open_where_no_segment_is_left, &map), 0);
    nsn_slots_close(slots);
    scratch_remove();
}

CHECK_MAIN()
