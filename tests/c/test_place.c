/* Places in System V shared memory: what is attached, and what is refused; and that nothing is left behind. */
#include <sys/shm.h>

#include "child.h"
#include "nsn_place.h"
#include "nsn_slots.h"
#include "scratch.h"
#include "users.h"

static char error[256];

static int attach(int32_t segment, uint32_t uid, uint32_t pid)
{
    const struct nsn_place *place;
    *error = 0;
    int result = nsn_place_attach(&place, segment, uid, pid, error, sizeof error);
    CHECK(result == 0 || *error);
    if (!result)
        nsn_place_detach(place);
    return result;
}

TEST(others_see_what_its_owner_writes_and_it_goes_with_the_last_of_them)
{
    struct nsn_place *own;
    const struct nsn_place *seen;
    int32_t segment;
    struct shmid_ds status;
    CHECK_EQUAL(nsn_place_make(&own, &segment, error, sizeof error), 0);
    CHECK_EQUAL(own->page.publishing, 0);
    CHECK_EQUAL(nsn_place_attach(&seen, segment, geteuid(), (uint32_t)getpid(), error, sizeof error), 0);
    own->board[NSN_SLOTS_MAX - 1] = 7;
    CHECK_EQUAL(seen->board[NSN_SLOTS_MAX - 1], 7);
    nsn_place_detach(own);
    CHECK_EQUAL(seen->board[NSN_SLOTS_MAX - 1], 7);
    CHECK_EQUAL(shmctl(segment, IPC_STAT, &status), 0);
    nsn_place_detach(seen);
    CHECK(shmctl(segment, IPC_STAT, &status) < 0);
    CHECK(attach(segment, geteuid(), 0) < 0);
}

static void write_into(void *memory) { *(volatile uint8_t *)memory = 1; }

TEST(nobody_else_can_write_nor_a_forked_child_use_it)
{
    struct nsn_place *own;
    const struct nsn_place *seen;
    int32_t segment;
    CHECK_EQUAL(nsn_place_make(&own, &segment, error, sizeof error), 0);
    CHECK_EQUAL(nsn_place_attach(&seen, segment, geteuid(), 0, error, sizeof error), 0);
    CHECK_EQUAL(end_of_child(write_into, (void *)(uintptr_t)seen), SIGSEGV);
    CHECK_EQUAL(end_of_child(write_into, own), SIGSEGV);
    nsn_place_detach(seen);
    nsn_place_detach(own);
}

TEST(what_is_not_a_place_is_refused_in_words)
{
    int other_size = shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0644), larger = shmget(IPC_PRIVATE, 1 << 24, IPC_CREAT | 0644);
    int open_to_all = shmget(IPC_PRIVATE, sizeof(struct nsn_place), IPC_CREAT | 0666);
    CHECK(other_size >= 0 && larger >= 0 && open_to_all >= 0);
    CHECK_EQUAL(attach(other_size, geteuid(), 0), -EPROTO);
    CHECK(strstr(error, "4096 bytes"));
    CHECK_EQUAL(attach(larger, geteuid(), 0), -EPROTO);
    CHECK_EQUAL(attach(open_to_all, geteuid(), 0), -EPROTO);
    CHECK(strstr(error, "mode 666"));
    CHECK_EQUAL(attach(-1, geteuid(), 0), -EINVAL);
    CHECK(attach(INT32_MAX, geteuid(), 0) < 0);
    shmctl(other_size, IPC_RMID, NULL);
    shmctl(larger, IPC_RMID, NULL);
    shmctl(open_to_all, IPC_RMID, NULL);
}

TEST(place_of_another_user_or_process_is_refused)
{
    struct nsn_place *own;
    int32_t segment;
    CHECK_EQUAL(nsn_place_make(&own, &segment, error, sizeof error), 0);
    CHECK_EQUAL(attach(segment, geteuid() + 1, 0), -EPROTO);
    CHECK_EQUAL(attach(segment, geteuid(), (uint32_t)getpid() + 1), -EPROTO);
    CHECK(strstr(error, "process"));
    nsn_place_detach(own);
}

TEST(huge_memory_is_refused)
{
    int segment = shmget(IPC_PRIVATE, sizeof(struct nsn_place), IPC_CREAT | 0644 | SHM_HUGETLB | SHM_NORESERVE);
    if (segment < 0) {
        printf("skipped: no huge pages for this user: %s\n", strerror(errno));
        return;
    }
    CHECK_EQUAL(attach(segment, geteuid(), 0), -EPROTO);
    CHECK(strstr(error, "ordinary"));
    shmctl(segment, IPC_RMID, NULL);
}

static void change_as_another(void *number)
{
    int32_t segment = *(int32_t *)number;
    struct shmid_ds status;
    syscall(SYS_setresuid, BOB, BOB, BOB);
    CHECK(shmat(segment, NULL, 0) == (void *)-1 && errno == EACCES);
    CHECK(shmctl(segment, IPC_RMID, NULL) < 0 && errno == EPERM);
    CHECK(shmctl(segment, IPC_STAT, &status) == 0);
    status.shm_perm.mode = 0666;
    CHECK(shmctl(segment, IPC_SET, &status) < 0 && errno == EPERM);
}

TEST(another_user_can_neither_write_nor_change_a_place)
{
    struct nsn_place *own;
    int32_t segment;
    if (!users_possible())
        return;
    users_be(ALICE);
    CHECK_EQUAL(nsn_place_make(&own, &segment, error, sizeof error), 0);
    users_be(0);
    CHECK_EQUAL(end_of_child(change_as_another, &segment), 0);
    CHECK_EQUAL(attach(segment, ALICE, (uint32_t)getpid()), 0);
    CHECK_EQUAL(attach(segment, 0, 0), -EPROTO);
    nsn_place_detach(own);
}

TEST(table_knows_others_and_the_next_nsnd_finds_their_places)
{
    struct nsn_place *own;
    int32_t segment;
    uint32_t generation;
    uint64_t identity[2] = {1, 2};
    struct nsn_slots *slots;
    scratch_make();
    CHECK_EQUAL(nsn_place_make(&own, &segment, error, sizeof error), 0);
    CHECK_EQUAL(nsn_slots_open(&slots, scratch, error, sizeof error), 0);
    CHECK_EQUAL(nsn_slots_view(slots)->others, 0);
    CHECK_EQUAL(nsn_slots_claim_other(slots, identity, (uint32_t)getpid(), 5, geteuid() + 1, segment, &generation, error,
                                      sizeof error), -EPROTO);
    CHECK_EQUAL(nsn_slots_claim_other(slots, identity, (uint32_t)getpid(), 5, geteuid(), segment, &generation, error,
                                      sizeof error), 0);
    const struct nsn_slot *slot = &nsn_slots_view(slots)->slot[0];
    CHECK(slot->alive == generation && (slot->traits & NSN_SLOT_OTHER) && slot->segment == segment && slot->uid == geteuid());
    uint64_t number = nsn_slots_view(slots)->others;
    CHECK(number > 0);
    own->page.counters.messages_out = 9;
    CHECK_EQUAL(nsn_slots_place(slots, 0)->page.counters.messages_out, 9);
    struct nsn_slots_map map;
    CHECK_EQUAL(nsn_slots_map(&map, scratch, true, error, sizeof error), 0);
    nsn_slots_close(slots);
    CHECK_EQUAL(nsn_slots_open(&slots, scratch, error, sizeof error), 0);
    CHECK_EQUAL(nsn_slots_place(slots, 0)->page.counters.messages_out, 9);
    CHECK(nsn_slots_view(slots)->others > number);
    number = nsn_slots_view(slots)->others;
    nsn_slots_free_slot(slots, 0);
    CHECK(nsn_slots_view(slots)->others > number);
    CHECK_EQUAL(nsn_slots_claim(slots, identity, 1, 1, 1, &generation), 0); /* of nsnd's user, in the same slot */
    CHECK_EQUAL(nsn_slots_view(slots)->slot[0].traits, 0);
    CHECK_EQUAL(nsn_slots_place(slots, 0)->page.counters.messages_out, 0);
    nsn_slots_free_slot(slots, 0);
    CHECK_EQUAL(nsn_slots_claim_other(slots, identity, (uint32_t)getpid(), 5, geteuid(), segment, &generation, error,
                                      sizeof error), 0);
    nsn_slots_close(slots);
    nsn_place_detach(own);
    CHECK_EQUAL(nsn_slots_open(&slots, scratch, error, sizeof error), 0); /* it is gone, and that is no failure */
    CHECK(nsn_slots_place(slots, 0) == NULL);
    nsn_slots_unmap(&map);
    nsn_slots_close(slots);
    scratch_remove();
}

CHECK_MAIN()
