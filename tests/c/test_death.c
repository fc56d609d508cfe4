/* A process is killed behind its n-th store to shared memory, for every n of what a session does. Each time the survivors
 * have everything that it had published, what they publish themselves arrives, nobody waits for the dead one, and its
 * interest and all memory of it are gone. Built with -DNSN_DEBUG_STORES. */
#include <dirent.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "node.h"

#define MESSAGES 512u       /* of one kind in one life, at most */
#define BATCH 64            /* messages that the victim takes at once, at most */
#define LARGE 50000u        /* bytes: goes by the pool */
#define PATIENCE_NS 20000000000ull
#define DEATHS_MAX 130u     /* of one scenario: where there are more stores, every so many-th */

/* What the victim tells, also when it is dead. */
struct report {
    uint64_t stores, die_at;
    uint32_t published;     /* publishes that returned, the same number for each subject */
    uint32_t ready;         /* its interest is known: the survivors may begin */
    uint32_t done;          /* the survivors have sent what they had to */
    uint32_t taking;        /* it is taking messages: those are in its hands, and nobody else's */
    uint8_t handled[MESSAGES]; /* queue messages that it had in hand and dealt with, by number */
};
static struct report *report;
static bool victim;

#ifdef NSN_DEBUG_STORES /* without it, nobody dies */
void nsn_debug_store(void)
{
    if (victim && ++report->stores == report->die_at)
        kill(getpid(), SIGKILL);
}
#endif

static void say(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
static uint32_t hear(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

/* --- messages --------------------------------------------------------------------------------------------------------- */

struct content {
    uint32_t life, number, size;
};

static uint8_t *content_of(uint32_t life, uint32_t number, uint32_t size)
{
    static uint8_t bytes[1 << 20];
    struct content head = {life, number, size};
    memset(bytes, (int)(life + number), size);
    memcpy(bytes, &head, sizeof head);
    return bytes;
}

static struct content check_content(const uint8_t *payload, uint32_t length)
{
    struct content head;
    CHECK(length >= sizeof head);
    memcpy(&head, payload, sizeof head);
    CHECK_EQUAL(head.size, length);
    CHECK_EQUAL(payload[length - 1], length == sizeof head ? payload[length - 1] : (uint8_t)(head.life + head.number));
    CHECK_EQUAL(payload[length / 2], length < 2 * sizeof head ? payload[length / 2] : (uint8_t)(head.life + head.number));
    CHECK(head.number < MESSAGES);
    return head;
}

/* --- survivors -------------------------------------------------------------------------------------------------------- */

enum { READER, SECOND, MEMBER, WRITER, TIGHT, SURVIVORS }; /* TIGHT: its links are full after 64 KiB */
enum { FROM_VICTIM, FROM_WRITER, QUEUED, PROBE, KINDS };   /* a message's sid says which */

struct survivor {
    struct nsn_session *session;
    uint8_t got[KINDS][MESSAGES];
    uint64_t discarded;     /* as a slow consumer */
    struct nsn_counters quiet;
};

static struct node *node;
static struct survivor survivors[SURVIVORS];
static uint32_t life;       /* counts the victims */
static bool reading = true; /* the survivors take what comes */
static size_t quiet_memory, quiet_descriptors;

static size_t mappings(void)
{
    char line[512];
    size_t count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    CHECK(maps);
    while (fgets(line, sizeof line, maps))
        count += strstr(line, "/memfd:nsn-") != NULL;
    fclose(maps);
    return count;
}

static size_t descriptors(void)
{
    size_t count = 0;
    DIR *directory = opendir("/proc/self/fd");
    CHECK(directory);
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

static void take(struct survivor *survivor)
{
    static struct nsn_message messages[256];
    static uint8_t blob[1 << 16];
    struct nsn_event event;
    nsn_session_process(survivor->session, 0);
    int count = nsn_receive(survivor->session, messages, 256, blob, sizeof blob, 0);
    CHECK(count >= 0);
    for (int i = 0; i < count; i++) {
        struct nsn_message *message = &messages[i];
        bool large = message->flags & NSN_MESSAGE_LARGE;
        const uint8_t *payload = large ? nsn_large(survivor->session, message->large)
                                       : blob + message->offset + message->subject_length + message->reply_length;
        struct content head = check_content(payload, message->payload_length);
        CHECK_EQUAL(head.life, life); /* nothing of an earlier one */
        survivor->got[message->sid - 1][head.number]++;
        if (large)
            nsn_large_release(survivor->session, message->large);
    }
    while (nsn_next_event(survivor->session, &event)) {
        if (event.kind == NSN_EVENT_SLOW_CONSUMER)
            survivor->discarded += event.number;
        CHECK(event.kind != NSN_EVENT_LINK_BROKEN && event.kind != NSN_EVENT_INTEREST);
    }
}

static void take_all(void)
{
    for (int i = 0; i < SURVIVORS; i++)
        if (reading)
            take(&survivors[i]);
        else
            nsn_session_process(survivors[i].session, 0);
}

/* A survivor's publish; everybody reads on meanwhile. Returns how many subscriptions it reached. */
static int publish(int who, const char *subject, uint32_t number, uint32_t size)
{
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    int result;
    while ((result = node_publish(survivors[who].session, subject, content_of(life, number, size), size)) < 0) {
        CHECK(result == -EAGAIN || result == -EALREADY);
        CHECK(nsn_now_ns() < until);
        take_all();
        nsn_space(survivors[who].session);
    }
    return result;
}

static void subscribe(int who, uint32_t kind, const char *subject, const char *queue)
{
    node_subscribe(survivors[who].session, kind + 1, subject, queue);
}

static void start_survivors(void)
{
    node = node_start();
    memset(survivors, 0, sizeof survivors);
    for (int i = 0; i < SURVIVORS; i++)
        survivors[i].session = node_session_with(
            node, (struct nsn_session_options){.name = "survivor", .link_limit = i == TIGHT ? 1 << 16 : 0});
    subscribe(READER, FROM_VICTIM, "victim.>", "");
    subscribe(SECOND, FROM_VICTIM, "victim.all.>", "");
    subscribe(READER, FROM_WRITER, "writer.>", "");
    subscribe(MEMBER, QUEUED, "queue", "group");
    for (uint32_t i = 0; i < SURVIVORS; i++)
        subscribe((int)i, PROBE, "probe", "");
}

static void stop_survivors(void)
{
    for (int i = 0; i < SURVIVORS; i++)
        nsn_session_close(survivors[i].session);
    node_stop(node);
}

static uint32_t alive(void)
{
    const struct nsn_slots_file *slots = nsn_slots_view(node->slots);
    uint32_t count = 0;
    for (uint64_t slot = 0; slot < nsn_load_acquire(&slots->highest); slot++)
        count += nsn_load_acquire(&slots->slot[slot].alive) != 0;
    return count;
}

static bool linked_as_before(void)
{
    for (int i = 0; i < SURVIVORS; i++) {
        struct nsn_counters now;
        nsn_session_counters(survivors[i].session, &now);
        if (now.links_in != survivors[i].quiet.links_in || now.links_out != survivors[i].quiet.links_out)
            return false;
    }
    return true;
}

/* Until the node has seen the victim's end, and every survivor has read its links to it to their ends and dropped them. */
static void part_with_victim(void)
{
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    while (alive() != SURVIVORS)
        CHECK(nsn_now_ns() < until);
    do { /* the node had brought its links before its place was free */
        if (nsn_now_ns() > until)
            fprintf(stderr, "survivors are still linked with the victim\n");
        CHECK(nsn_now_ns() < until);
        take_all();
    } while (!linked_as_before());
}

/* Nobody waits for the victim: every barrier passes, and what is published comes. */
static void check_quiet(void)
{
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    for (int i = 0; i < SURVIVORS; i++) {
        int token = nsn_barrier_begin(survivors[i].session);
        while (!nsn_barrier_done(survivors[i].session, token)) {
            CHECK(nsn_now_ns() < until);
            take_all();
        }
    }
    for (uint32_t i = 0; i < SURVIVORS; i++)
        CHECK_EQUAL(publish((int)i, "probe", i, 100), SURVIVORS);
    for (uint32_t i = 0; i < SURVIVORS * SURVIVORS; i++)
        while (!survivors[i / SURVIVORS].got[PROBE][i % SURVIVORS]) {
            CHECK(nsn_now_ns() < until);
            take_all();
        }
    CHECK_EQUAL(publish(WRITER, "victim.own", 0, 100), 1); /* READER alone */
    while (!survivors[READER].got[FROM_VICTIM][0])
        take_all();
}

static void note_quiet(void)
{
    take_all();
    for (int i = 0; i < SURVIVORS; i++)
        nsn_session_counters(survivors[i].session, &survivors[i].quiet);
    quiet_memory = mappings();
    quiet_descriptors = descriptors();
}

static void forget_messages(void)
{
    for (int i = 0; i < SURVIVORS; i++) {
        memset(survivors[i].got, 0, sizeof survivors[i].got);
        survivors[i].discarded = 0;
    }
}

/* --- the victim ------------------------------------------------------------------------------------------------------- */

static struct nsn_session *own; /* the victim's session */

static void open_own(struct nsn_session_options options)
{
    options.name = "victim";
    own = node_session_with(node, options);
}

/* Publishes the next message, to be waited for; with give_up a full link is given up at once. */
static void victim_publish(const char *subject, uint32_t size, bool give_up)
{
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    int result;
    while ((result = node_publish(own, subject, content_of(life, report->published, size), size)) < 0) {
        CHECK(result == -EAGAIN || result == -EALREADY);
        CHECK(nsn_now_ns() < until);
        nsn_session_process(own, 0);
        if (result == -EAGAIN && give_up)
            CHECK(nsn_publish_give_up(own) >= 0);
        else if (result == -EAGAIN && !nsn_space(own))
            nsn_doze(own, 20000000);
    }
    report->published++;
}

static void victim_subscribe(uint32_t sid, const char *subject, const char *queue)
{
    node_subscribe(own, sid, subject, queue);
}

static uint32_t held[MESSAGES], held_count, taken;

/* Takes what is there. Large ones are held until release_held(). Returns how many. */
static int victim_take(void)
{
    static struct nsn_message messages[BATCH];
    static uint8_t blob[1 << 16];
    nsn_session_process(own, 0);
    say(&report->taking, 1);
    int count = nsn_receive(own, messages, BATCH, blob, sizeof blob, 0);
    CHECK(count >= 0);
    for (int i = 0; i < count; i++) {
        struct nsn_message *message = &messages[i];
        bool large = message->flags & NSN_MESSAGE_LARGE;
        const uint8_t *payload = large ? nsn_large(own, message->large) : blob + message->offset + message->subject_length;
        struct content head = check_content(payload, message->payload_length);
        report->handled[head.number]++;
        if (large)
            held[held_count++] = message->large;
    }
    say(&report->taking, 0);
    taken += (uint32_t)count;
    return count;
}

static void release_held(void)
{
    while (held_count)
        nsn_large_release(own, held[--held_count]);
}

/* Until it has had so many in its life. */
static void victim_take_until(uint32_t messages)
{
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    while (taken < messages) {
        victim_take();
        CHECK(nsn_now_ns() < until);
    }
}

static void victim_barrier(void)
{
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    int token = nsn_barrier_begin(own);
    CHECK(token > 0);
    while (!nsn_barrier_done(own, token)) {
        victim_take();
        CHECK(nsn_now_ns() < until);
    }
}

/* --- scenarios -------------------------------------------------------------------------------------------------------- */

struct scenario {
    const char *name;
    void (*run)(void);      /* by the victim */
    void (*drive)(void);    /* by the survivors, again and again while it lives; NULL: they just read */
    void (*check)(void);    /* by the survivors, when nothing is left of it */
    bool reading;           /* they read while it lives */
};

static uint32_t sent; /* by WRITER or TIGHT in this life */
static uint64_t lost_in_hand, doubled_in_hand; /* queue messages that the dead ones had in hand, over all lives */

/* What every subscriber must have of the victim's messages: each that was published once, the one in hand at most once. */
static void check_received(int who)
{
    for (uint32_t i = 0; i < MESSAGES; i++) {
        uint32_t got = survivors[who].got[FROM_VICTIM][i];
        if (i < report->published ? got != 1 : got > (i == report->published))
            fprintf(stderr, "survivor %d has message %u of %u %u times\n", who, i, report->published, got);
        CHECK(i < report->published ? got == 1 : got <= (i == report->published));
    }
}

static void check_reader(void) { check_received(READER); }

static void publish_small(void)
{
    open_own((struct nsn_session_options){0});
    for (uint32_t i = 0; i < 5; i++)
        victim_publish("victim.own", 16 + i * 2000, false);
    victim_barrier();
    nsn_session_close(own);
}

static void publish_pool(void)
{
    open_own((struct nsn_session_options){0});
    for (uint32_t i = 0; i < 4; i++)
        victim_publish("victim.own", LARGE << i, false);
    nsn_trim(own);
    nsn_session_close(own);
}

static void publish_buffer(void)
{
    open_own((struct nsn_session_options){0});
    for (uint32_t i = 0; i < 3; i++) {
        struct nsn_buffer_out buffer;
        uint32_t size = 1000 + i * LARGE;
        CHECK_EQUAL(nsn_buffer_take(own, size, &buffer), 0);
        nsn_copy_to_shared(buffer.data, content_of(life, report->published, size), size);
        CHECK_EQUAL(nsn_publish_buffer(own, "victim.own", 10, "", 0, &buffer, size), 1);
        report->published++;
    }
    nsn_session_close(own);
}

/* Segments are given back while consumers have them mapped. */
static void pool_exhausted(void)
{
    open_own((struct nsn_session_options){.budget = 3 << 20});
    for (uint32_t i = 0; i < 8; i++)
        victim_publish("victim.own", (i % 2 ? LARGE : 4 * LARGE) << (i / 4), false);
    nsn_session_close(own);
}

static void fan_out(void)
{
    open_own((struct nsn_session_options){0});
    for (uint32_t i = 0; i < 6; i++)
        victim_publish("victim.all.x", i % 2 ? LARGE : 100, false);
    nsn_session_close(own);
}

static void check_fan_out(void)
{
    check_received(READER);
    check_received(SECOND);
}

/* Nobody reads: the link fills up, and the subscriber is given up. */
static void give_up(void)
{
    open_own((struct nsn_session_options){.link_limit = 1 << 15});
    for (uint32_t i = 0; i < 12; i++)
        victim_publish("victim.own", i % 3 == 2 ? 10000 : 4000, true);
    nsn_session_close(own);
}

static void check_given_up(void)
{
    uint64_t got = survivors[READER].discarded;
    for (uint32_t i = 0; i < MESSAGES; i++) {
        CHECK(survivors[READER].got[FROM_VICTIM][i] <= 1);
        got += survivors[READER].got[FROM_VICTIM][i];
    }
    if (got < report->published || got > report->published + 1)
        fprintf(stderr, "%u published, %llu came or were counted\n", report->published, (unsigned long long)got);
    CHECK(got >= report->published && got <= report->published + 1);
}

/* The victim as one subscriber among others, or as a member of a queue group. */
static void send_some(uint32_t most, const char *subject, uint32_t period)
{
    if (hear(&report->ready) && sent < most) {
        CHECK(publish(WRITER, subject, sent, sent % period == period - 1 ? LARGE : 200) > 0);
        sent++;
    }
}

static void drive_plain(void) { send_some(12, "writer.x", 3); }
static void drive_queue(void)
{
    send_some(24, "queue", 4);
    if (sent == 24)
        say(&report->done, 1);
}

/* Only a few at a time, so that only so many can be in the victim's hands. */
static void drive_queue_slowly(void)
{
    uint32_t dealt_with = 0;
    for (uint32_t i = 0; i < sent; i++)
        dealt_with += survivors[MEMBER].got[QUEUED][i] || report->handled[i];
    if (sent - dealt_with < 3)
        drive_queue();
}
static void drive_chunks(void)
{
    if (hear(&report->ready) && sent < 10 * hear(&report->ready)) {
        CHECK(publish(WRITER, "writer.x", sent, 7000) > 0);
        sent++;
    }
}

static void check_plain(void)
{
    for (uint32_t i = 0; i < MESSAGES; i++)
        CHECK_EQUAL(survivors[READER].got[FROM_WRITER][i], i < sent);
}

/* So many chunks that the victim gives memory back as it reads. */
static void drive_backlog(void)
{
    if (!hear(&report->ready))
        return;
    for (; sent < MESSAGES; sent++)
        CHECK(publish(WRITER, "queue", sent, 8000) > 0);
    say(&report->done, 1);
}

/* The rest of the queue messages is sent when the victim is gone. */
static void check_queue(void)
{
    uint32_t lost = 0, doubled = 0;
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    say(&report->ready, 1);
    while (sent < 24)
        drive_queue();
    for (int i = 0; i < SURVIVORS; i++) { /* also what is passed on has arrived behind two barriers */
        int token = nsn_barrier_begin(survivors[i == WRITER ? WRITER : MEMBER].session);
        while (!nsn_barrier_done(survivors[i == WRITER ? WRITER : MEMBER].session, token)) {
            CHECK(nsn_now_ns() < until);
            take_all();
        }
    }
    for (uint32_t i = 0; i < MESSAGES; i++) {
        uint32_t got = survivors[MEMBER].got[QUEUED][i] + report->handled[i];
        lost += i < sent && got == 0;
        doubled += got > (i < sent);
        CHECK(survivors[MEMBER].got[QUEUED][i] <= 2);
    }
    if ((lost && !report->taking) || doubled > 1)
        fprintf(stderr, "%u queue messages lost, %u doubled\n", lost, doubled);
    CHECK(!lost || report->taking);
    CHECK(doubled <= 1); /* passed on, and still to be seen in the link that it came by */
    CHECK(report->stores == report->die_at || (!lost && !doubled));
    lost_in_hand += lost;
    doubled_in_hand += doubled;
}

static void subscribe_and_unsubscribe(void)
{
    open_own((struct nsn_session_options){0});
    for (uint32_t sid = 1; sid <= 3; sid++)
        victim_subscribe(sid, sid == 2 ? "writer.*" : "other.>", sid == 3 ? "group" : "");
    CHECK_EQUAL(nsn_unsubscribe(own, 1, 0), 0);
    say(&report->ready, 1);
    victim_take_until(6);
    CHECK_EQUAL(nsn_unsubscribe(own, 2, 11), 0);
    victim_take_until(11);
    CHECK_EQUAL(nsn_unsubscribe(own, 3, 0), 0);
    victim_barrier();
    release_held();
    nsn_session_close(own);
}

static void consume(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "writer.x", "");
    say(&report->ready, 1);
    victim_take_until(8);
    release_held();
    victim_take_until(12);
    nsn_session_close(own);
}

static void drain(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "writer.>", "");
    say(&report->ready, 1);
    victim_take_until(5);
    CHECK_EQUAL(nsn_drain(own, 1), 0);
    victim_barrier();
    CHECK_EQUAL(nsn_unsubscribe(own, 1, 0), 0);
    victim_barrier();
    release_held();
    nsn_session_close(own);
}

static void sleep_and_wake(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "writer.x", "");
    say(&report->ready, 1);
    while (taken < 12)
        if (!victim_take())
            nsn_doze(own, 1000000000);
    release_held();
    nsn_session_close(own);
}

static void await_done(void)
{
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    while (!hear(&report->done)) {
        nsn_session_process(own, 0);
        CHECK(nsn_now_ns() < until);
    }
}

static void queue_member(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "queue", "group");
    say(&report->ready, 1);
    while (!hear(&report->done))
        victim_take();
    release_held();
    nsn_session_close(own);
}

static void queue_backlog(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "queue", "group");
    say(&report->ready, 1);
    await_done();
    while (victim_take())
        ;
    nsn_session_close(own);
}

/* All that it got lies unread when it leaves the group: it passes that on. */
static void queue_leaver(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "queue", "group");
    say(&report->ready, 1);
    await_done();
    CHECK_EQUAL(nsn_unsubscribe(own, 1, 0), 0);
    victim_barrier();
    victim_barrier(); /* what was passed on is with the other */
    nsn_session_close(own);
}

static void queue_maximum(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "queue", "group");
    CHECK_EQUAL(nsn_unsubscribe(own, 1, 3), 0);
    say(&report->ready, 1);
    victim_take_until(3);
    victim_barrier();
    release_held();
    nsn_session_close(own);
}

static void trim(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "writer.x", "");
    for (uint32_t round = 1; round <= 3; round++) {
        say(&report->ready, round);
        victim_take_until(10 * round);
        nsn_trim(own);
    }
    nsn_session_close(own);
}

/* The victim does not read, is given up, and then runs again. */
static void drive_tight(void)
{
    struct nsn_session *session = survivors[TIGHT].session;
    if (!hear(&report->ready) || sent >= 30)
        return;
    int result = node_publish(session, "writer.x", content_of(life, sent, 6000), 6000);
    if (result == -EAGAIN)
        nsn_publish_give_up(session);
    else if (result != -EALREADY) {
        CHECK(result > 0);
        if (++sent == 30)
            say(&report->done, 1);
    }
}

static void slow_consumer(void)
{
    open_own((struct nsn_session_options){0});
    victim_subscribe(1, "writer.x", "");
    say(&report->ready, 1);
    await_done();
    victim_barrier();
    struct nsn_event event;
    uint64_t got = 0;
    while (nsn_next_event(own, &event))
        got += event.kind == NSN_EVENT_SLOW_CONSUMER ? event.number : 0;
    CHECK(got > 0);
    for (uint32_t i = 0; i < MESSAGES; i++)
        got += report->handled[i];
    CHECK_EQUAL(got, 30);
    nsn_session_close(own);
}

static const struct scenario scenarios[] = {
    {"publish_small", publish_small, NULL, check_reader, true},
    {"publish_pool", publish_pool, NULL, check_reader, true},
    {"publish_buffer", publish_buffer, NULL, check_reader, true},
    {"pool_exhausted", pool_exhausted, NULL, check_reader, true},
    {"fan_out", fan_out, NULL, check_fan_out, true},
    {"give_up", give_up, NULL, check_given_up, false},
    {"subscribe", subscribe_and_unsubscribe, drive_plain, check_plain, true},
    {"consume", consume, drive_plain, check_plain, true},
    {"drain", drain, drive_plain, check_plain, true},
    {"sleep", sleep_and_wake, drive_plain, check_plain, true},
    {"queue_member", queue_member, drive_queue_slowly, check_queue, true},
    {"queue_backlog", queue_backlog, drive_backlog, check_queue, true},
    {"queue_leaver", queue_leaver, drive_queue, check_queue, true},
    {"queue_maximum", queue_maximum, drive_queue, check_queue, true},
    {"trim", trim, drive_chunks, check_plain, true},
    {"slow_consumer", slow_consumer, drive_tight, check_plain, true},
};

/* --- lives ------------------------------------------------------------------------------------------------------------ */

/* One victim from its connect to its death behind that store (0: never). True when it was killed. */
static bool live(const struct scenario *scenario, uint64_t die_at)
{
    life++;
    sent = 0;
    forget_messages();
    memset(report, 0, sizeof *report);
    report->die_at = die_at;
    reading = scenario->reading;
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        victim = true;
        scenario->run();
        _exit(0);
    }
    int status;
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    while (waitpid(pid, &status, WNOHANG) == 0) {
        if (nsn_now_ns() > until) {
            fprintf(stderr, "%s: the victim that is to die at store %llu hangs at %llu\n", scenario->name,
                    (unsigned long long)die_at, (unsigned long long)report->stores);
            kill(pid, SIGKILL);
            exit(1);
        }
        if (scenario->drive)
            scenario->drive();
        take_all();
    }
    CHECK(WIFSIGNALED(status) ? WTERMSIG(status) == SIGKILL && report->stores == die_at : WEXITSTATUS(status) == 0);
    reading = true;
    return WIFSIGNALED(status);
}

static void check_life(const struct scenario *scenario)
{
    uint64_t until = nsn_now_ns() + PATIENCE_NS;
    part_with_victim();
    scenario->check();
    forget_messages();
    check_quiet();
    CHECK_EQUAL(mappings(), quiet_memory);
    while (descriptors() != quiet_descriptors) { /* those of links until they are seen taken, and the node's */
        CHECK(nsn_now_ns() < until);
        take_all();
    }
}

static void run_scenario(const struct scenario *scenario)
{
    report = mmap(NULL, sizeof *report, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(report != MAP_FAILED);
    start_survivors();
    lost_in_hand = doubled_in_hand = 0;
    life = 0;
    for (uint32_t i = 0; i < 3; i++) { /* every link that there is without a victim */
        forget_messages();
        publish(WRITER, "queue", 0, LARGE);
        publish(WRITER, "writer.x", 0, LARGE);
        publish(TIGHT, "writer.x", 1, 200);
        for (int k = 0; k < SURVIVORS; k++)
            CHECK(nsn_arm(survivors[k].session) >= 0); /* everybody has rung somebody: that takes a socket */
        for (int k = 0; k < SURVIVORS; k++)
            publish(k, "probe", SURVIVORS, 100);
        check_quiet();
    }
    note_quiet();
    uint64_t stores = UINT64_MAX, deaths = 0;
    for (int i = 0; i < 3; i++) { /* how often it has to wait is chance */
        CHECK(!live(scenario, 0));
        check_life(scenario);
        stores = report->stores < stores ? report->stores : stores;
    }
    uint64_t step = stores / DEATHS_MAX + 1;
    for (uint64_t die_at = 1; live(scenario, die_at); die_at += step, deaths++) {
        check_life(scenario);
        CHECK(deaths < 3 * DEATHS_MAX);
    }
    check_life(scenario);
    printf("%s: %llu stores, %llu deaths; in the hands of the dead: %llu queue messages lost, %llu doubled\n",
           scenario->name, (unsigned long long)stores, (unsigned long long)deaths, (unsigned long long)lost_in_hand,
           (unsigned long long)doubled_in_hand);
    stop_survivors();
    munmap(report, sizeof *report);
}

int main(int count, char **names)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t i = 0; i < sizeof scenarios / sizeof scenarios[0]; i++)
        if (count < 2 || strcmp(names[1], scenarios[i].name) == 0)
            run_scenario(&scenarios[i]);
    return 0;
}
