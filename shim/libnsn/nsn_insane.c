/* An INSANE session's life: attaching, waiting for messages, attaching again when nsnd was gone, closing.
 *
 * Of the threads that wait, one leads: it spins or sleeps for all of them, and puts what comes into the sinks' queues. The
 * others sleep until it has dispatched something or leaves. Whoever receives does so with the lock held, so that the order
 * of a sink's messages is that of the session.
 */
#include "nsn_insane.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "nsn_insane_internal.h"
#include "nsn_link.h"

_Static_assert(NSN_BATCH >= NSN_RECORD_SIDS, "nsn_receive takes a record as a whole");

#define ATTACH_NS (5 * NSN_SECOND_NS)
#define WRITE_DEADLINE_NS (10 * NSN_SECOND_NS)
#define GONE_NS (5 * NSN_SECOND_NS)   /* how long a call waits when nsnd is gone */
#define ROUNDS 32                     /* of spinning, between looks at the clock and at who else wants the lock */
#define ATTACH_AGAIN_NS 20000000ull   /* first wait between attempts; doubled up to … */
#define ATTACH_AGAIN_MAX_NS NSN_SECOND_NS
#define START_AGAIN_NS (2 * NSN_SECOND_NS)
#define TURN_NS 500000ull             /* how long a leader that spins waits for another that wants the lock */
#define FOLLOW_NS 100000000ull        /* a follower looks around that often: signals do not wake it */
#define SPIN_MAX_NS 100000ull         /* adaptive, as shim/spin.py */
#define SPIN_MIN_NS 6000ull
#define SPIN_WORTH_NS 200000ull
#define TRUST_FIRST 2
#define TRUST_LAST 1024
#define SURE_HITS 8

static const char forked[] = "this session was opened before fork(): open one in the child (nsn_init)";

/* --- the lock ----------------------------------------------------------------------------------------------------- */

void nsn_insane_lock(struct nsn_insane *insane)
{
    if (pthread_mutex_trylock(&insane->lock) == 0)
        return;
    __atomic_add_fetch(&insane->contenders, 1, __ATOMIC_RELAXED); /* both are only looked at by make_way() */
    pthread_mutex_lock(&insane->lock);
    __atomic_sub_fetch(&insane->contenders, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&insane->turns, 1, __ATOMIC_RELAXED);
}

/* Who spins with the lock would get it back at once, before another has even woken up: so it waits for the other's turn. */
static void make_way(struct nsn_insane *insane)
{
    if (!__atomic_load_n(&insane->contenders, __ATOMIC_RELAXED))
        return;
    uint32_t turns = __atomic_load_n(&insane->turns, __ATOMIC_RELAXED);
    uint64_t until = nsn_now_ns() + TURN_NS;
    nsn_insane_unlock(insane);
    while (__atomic_load_n(&insane->turns, __ATOMIC_RELAXED) == turns && nsn_now_ns() < until)
        sched_yield();
    nsn_insane_lock(insane);
}

int nsn_insane_check(struct nsn_insane *insane)
{
    return nsn_session_forked(insane->session) ? nsn_insane_fail(-ECHILD, "%s", forked) : 0;
}

/* --- warnings ----------------------------------------------------------------------------------------------------- */

void nsn_insane_warn(struct nsn_insane *insane, uint32_t kind, const char *format, ...)
{
    if (insane->warned & 1u << kind)
        return;
    insane->warned |= 1u << kind;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(insane->warning, sizeof insane->warning, format, arguments);
    va_end(arguments);
}

int nsn_insane_warning(struct nsn_insane *insane, char *text, size_t size)
{
    if (!__atomic_load_n(&insane->warning[0], __ATOMIC_RELAXED) || nsn_session_forked(insane->session))
        return 0;
    nsn_insane_lock(insane);
    int found = insane->warning[0] != 0;
    snprintf(text, size, "%s", insane->warning);
    insane->warning[0] = 0;
    nsn_insane_unlock(insane);
    return found;
}

/* --- nsnd --------------------------------------------------------------------------------------------------------- */

static void read_events(struct nsn_insane *insane)
{
    struct nsn_event event;
    while (nsn_next_event(insane->session, &event)) {
        struct nsn_thing *sink;
        switch (event.kind) {
        case NSN_EVENT_SLOW_CONSUMER:
            nsn_insane_warn(insane, event.kind, "this program did not take its messages within a publisher's write deadline: "
                            "%llu were dropped; consume sooner, or in a thread of its own", (unsigned long long)event.number);
            break;
        case NSN_EVENT_GAVE_UP:
        case NSN_EVENT_LINK_BROKEN:
        case NSN_EVENT_VERSIONS:
            nsn_insane_warn(insane, event.kind, "%s", event.text);
            break;
        case NSN_EVENT_INTEREST:
            nsn_insane_warn(insane, event.kind, "%s", event.text);
            sink = nsn_things_find(&insane->sinks, event.sid);
            if (sink)
                sink->sink.refused = event.error;
            break;
        default:
            break;
        }
    }
}

static void subscribe_again(struct nsn_insane *insane)
{
    struct nsn_thing *sink;
    for (uint32_t place = 0; (sink = nsn_things_next(&insane->sinks, &place));)
        if (nsn_sink_subscribe(insane, sink) < 0)
            nsn_insane_warn(insane, NSN_EVENT_INTEREST, "channel %u could not be subscribed again: %s", sink->sink.channel,
                            nsn_session_error(insane->session));
    nsn_session_process(insane->session, 0);
}

/* nsnd is gone: its socket is tried, and when the caller has time and nobody is there, another is started. */
static void attach_again(struct nsn_insane *insane, bool wait)
{
    uint64_t now = nsn_now_ns();
    if (!insane->detached_since) {
        insane->detached_since = now;
        insane->attach_next = now;
        insane->start_next = now + ATTACH_AGAIN_MAX_NS;
        insane->attach_wait_ns = ATTACH_AGAIN_NS;
        snprintf(insane->detached_words, sizeof insane->detached_words, "%s", nsn_session_error(insane->session));
    }
    if (now < insane->attach_next)
        return;
    insane->attach_next = now + insane->attach_wait_ns;
    if (insane->attach_wait_ns < ATTACH_AGAIN_MAX_NS)
        insane->attach_wait_ns *= 2;
    if (nsn_session_reattach(insane->session, insane->node.socket) == 0) {
        nsn_session_process(insane->session, wait ? ATTACH_AGAIN_NS : 0);
        return;
    }
    if (!wait || now < insane->start_next)
        return;
    insane->start_next = now + START_AGAIN_NS;
    nsn_insane_unlock(insane);
    struct nsn_node node;
    int result = nsn_node_find(insane->options.application_id, insane->options.nsnd, &node);
    nsn_insane_lock(insane);
    if (result == 0) {
        insane->node = node;
        insane->attach_next = 0;
    } else {
        snprintf(insane->detached_words, sizeof insane->detached_words, "%s", nsn_insane_error());
    }
}

/* The descriptors of an attachment, which are others after it was lost. */
static int watch_session(struct nsn_insane *insane)
{
    int fds[2] = {nsn_session_bell_fd(insane->session), nsn_session_control_fd(insane->session)};
    for (int i = 0; i < 2; i++) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fds[i]};
        if (fds[i] >= 0 && epoll_ctl(insane->watch, EPOLL_CTL_ADD, fds[i], &event) < 0 && errno != EEXIST)
            return -errno;
    }
    return 0;
}

static void attached(struct nsn_insane *insane)
{
    struct nsn_session_info info;
    insane->detached_since = 0;
    nsn_session_info(insane->session, &info);
    insane->max_payload = info.max_payload;
    if (insane->watch >= 0 && watch_session(insane) < 0)
        nsn_insane_warn(insane, 31, "an event loop cannot watch the session any more: %s", strerror(errno));
}

void nsn_insane_attend(struct nsn_insane *insane, bool wait)
{
    nsn_session_process(insane->session, 0);
    nsn_insane_answer(insane);
    read_events(insane);
    int state = nsn_session_state(insane->session);
    if (state == NSN_READY) {
        if (insane->detached_since)
            attached(insane);
        return;
    }
    if (state == NSN_LOST) {
        nsn_session_accept_loss(insane->session);
        subscribe_again(insane);
        attached(insane);
        return;
    }
    if (nsn_session_control_fd(insane->session) < 0)
        attach_again(insane, wait);
}

/* --- receiving ---------------------------------------------------------------------------------------------------- */

static void ring_eventfd(int fd)
{
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static void answer_eventfd(int fd)
{
    uint64_t count;
    while (read(fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
}

void nsn_insane_wake_all(struct nsn_insane *insane)
{
    pthread_mutex_lock(&insane->changed_lock);
    insane->changes++;
    if (insane->followers)
        pthread_cond_broadcast(&insane->changed);
    pthread_mutex_unlock(&insane->changed_lock);
    if (insane->dozing)
        ring_eventfd(insane->kick);
    if (insane->watching)
        ring_eventfd(insane->notice);
}

void nsn_insane_follow(struct nsn_insane *insane, uint64_t deadline)
{
    uint64_t until = nsn_now_ns() + FOLLOW_NS;
    until = until < deadline ? until : deadline;
    struct timespec at = {(time_t)(until / NSN_SECOND_NS), (long)(until % NSN_SECOND_NS)};
    uint32_t changes = insane->changes;
    insane->followers++;
    nsn_insane_unlock(insane);
    pthread_mutex_lock(&insane->changed_lock);
    while (insane->changes == changes && pthread_cond_timedwait(&insane->changed, &insane->changed_lock, &at) == 0)
        ;
    pthread_mutex_unlock(&insane->changed_lock);
    nsn_insane_lock(insane);
    insane->followers--;
}

static void into_queue(struct nsn_insane *insane, const struct nsn_message *message, struct nsn_chunk *chunk)
{
    struct nsn_session *session = insane->session;
    struct nsn_thing *thing = nsn_things_find(&insane->sinks, message->sid);
    struct nsn_sink *sink = thing ? &thing->sink : NULL;
    struct nsn_loan *loan = NULL;
    bool large = message->flags & NSN_MESSAGE_LARGE;
    if (sink && (sink->count >= NSN_SINK_MESSAGES || sink->bytes >= NSN_SINK_BYTES)) {
        nsn_insane_warn(insane, 0, "messages of channel %u are dropped: the program does not consume from that sink",
                        sink->channel);
        sink->dropped++;
    } else if (sink) {
        loan = insane->spare ? insane->spare : nsn_loan_take(insane, UINT64_MAX);
        insane->spare = NULL;
        sink->dropped += !loan;
    }
    if (!loan) {
        if (large)
            nsn_large_release(session, message->large);
        return;
    }
    if (large) {
        loan->kind = NSN_LOAN_LARGE;
        loan->large = message->large;
        loan->data = (uint8_t *)nsn_large(session, message->large) + message->header_length;
    } else {
        loan->kind = NSN_LOAN_CHUNK;
        loan->chunk = chunk;
        chunk->lent++;
        loan->data = chunk->bytes + chunk->used + message->offset + message->subject_length + message->reply_length +
                     message->header_length;
    }
    loan->capacity = message->payload_length;
    loan->buffer.data = loan->data;
    loan->buffer.len = message->payload_length;
    *sink->last = loan;
    sink->last = &loan->next;
    sink->count++;
    sink->bytes += message->payload_length;
    if (sink->callback && !sink->listed) {
        sink->listed = true;
        sink->next_ready = NULL;
        *insane->ready_last = sink;
        insane->ready_last = &sink->next_ready;
    }
}

int nsn_insane_take(struct nsn_insane *insane, bool leading)
{
    struct nsn_chunk *chunk = nsn_chunk_fill(insane);
    if (!chunk)
        return 0;
    int count = nsn_receive(insane->session, insane->messages, NSN_BATCH, chunk->bytes + chunk->used,
                            NSN_CHUNK_BYTES - chunk->used, 0);
    size_t used = 0;
    for (int i = 0; i < count; i++) {
        const struct nsn_message *message = &insane->messages[i];
        bool large = message->flags & NSN_MESSAGE_LARGE;
        size_t end = message->offset + message->subject_length + message->reply_length +
                     (large ? 0 : message->header_length + message->payload_length);
        into_queue(insane, message, chunk);
        used = end > used ? end : used;
    }
    chunk->used += (uint32_t)((used + 15) & ~15ull);
    if (count > 0) {
        insane->trim_at = 1; /* when there is time, a second after that */
        if (insane->followers || insane->watching || (insane->dozing && !leading))
            nsn_insane_wake_all(insane);
    } else if (((insane->dozing && !leading) || insane->watching) && !nsn_arm(insane->session)) {
        nsn_insane_wake_all(insane); /* receiving had awoken the session for those who sleep, and something came meanwhile */
    } else if (!insane->spare) {
        insane->spare = nsn_loan_take(insane, UINT64_MAX);
    }
    return count > 0 ? count : 0;
}

/* --- waiting ------------------------------------------------------------------------------------------------------ */

static void spin_hit(struct nsn_spin *spin)
{
    spin->budget_ns = SPIN_MAX_NS;
    if (++spin->hits >= SURE_HITS)
        spin->trust = TRUST_FIRST;
}

static void spin_miss(struct nsn_spin *spin)
{
    spin->hits = 0;
    spin->budget_ns /= 2;
    if (spin->budget_ns >= SPIN_MIN_NS)
        return;
    spin->budget_ns = 0;
    spin->short_sleeps = 0;
    spin->trust = spin->trust * 2 < TRUST_LAST ? spin->trust * 2 : TRUST_LAST;
}

static void spin_woken(struct nsn_spin *spin, uint64_t slept_ns)
{
    if (spin->budget_ns)
        return;
    spin->short_sleeps = slept_ns < SPIN_WORTH_NS ? spin->short_sleeps + 1 : 0;
    if (spin->short_sleeps < spin->trust)
        return;
    spin->short_sleeps = 0;
    spin->budget_ns = SPIN_MAX_NS;
}

/* True when something was dispatched, or the caller is to look around for another reason. */
static bool spin_for_all(struct nsn_insane *insane, uint64_t until)
{
    uint64_t attend_at = nsn_now_ns() + NSN_ATTEND_NS;
    uint32_t changes = insane->changes;
    for (;;) {
        for (int round = 0; round < ROUNDS; round++) {
            if (nsn_insane_take(insane, true))
                return true;
            nsn_cpu_relax(); /* once: on some processors it takes 140 cycles */
        }
        make_way(insane);
        uint64_t now = nsn_now_ns();
        if (insane->changes != changes)
            return true;
        if (now >= until)
            return false;
        if (now < attend_at)
            continue;
        nsn_insane_attend(insane, true);
        if (insane->detached_since)
            return true;
        attend_at = now + NSN_ATTEND_NS;
    }
}

/* How long the leader may sleep: to the deadline, to the next attempt to attach, to the time for giving memory back. */
static uint64_t longest_sleep(struct nsn_insane *insane, uint64_t now, uint64_t deadline)
{
    uint64_t until = deadline;
    if (insane->trim_at == 1)
        insane->trim_at = now + NSN_SECOND_NS;
    if (insane->trim_at && insane->trim_at < until)
        until = insane->trim_at;
    if (insane->detached_since && insane->attach_next < until)
        until = insane->attach_next;
    else if (nsn_session_state(insane->session) != NSN_READY && until > now + ATTACH_AGAIN_NS)
        until = now + ATTACH_AGAIN_NS;
    return until > now ? until - now : 0;
}

static int sleep_for_all(struct nsn_insane *insane, uint64_t deadline)
{
    struct nsn_session *session = insane->session;
    nsn_insane_attend(insane, true);
    if (nsn_receive_held(session)) { /* for another's publish that is under way: it is over in no time */
        nsn_insane_unlock(insane);
        sched_yield();
        nsn_insane_lock(insane);
        nsn_insane_take(insane, true);
        return 0;
    }
    if (!nsn_arm(session)) {
        nsn_insane_take(insane, true);
        return 0;
    }
    uint64_t now = nsn_now_ns(), sleep_ns = longest_sleep(insane, now, deadline);
    struct pollfd fds[3] = {{.fd = nsn_session_bell_fd(session), .events = POLLIN}, {.fd = insane->kick, .events = POLLIN},
                            {.fd = nsn_session_control_fd(session), .events = POLLIN}};
    struct timespec timeout = {(time_t)(sleep_ns / NSN_SECOND_NS), (long)(sleep_ns % NSN_SECOND_NS)};
    insane->dozing = true;
    nsn_insane_unlock(insane);
    int ready = ppoll(fds, 3, &timeout, NULL), error = ready < 0 ? errno : 0;
    nsn_insane_lock(insane);
    insane->dozing = false;
    if (fds[1].revents)
        answer_eventfd(insane->kick);
    nsn_disarm(session);
    if (ready > 0 && !insane->spin.budget_ns)
        spin_woken(&insane->spin, nsn_now_ns() - now);
    if (ready == 0 && insane->trim_at > 1 && nsn_now_ns() >= insane->trim_at)
        insane->trim_at = nsn_trim(session) ? nsn_now_ns() + NSN_SECOND_NS : 0;
    nsn_insane_take(insane, true);
    return error == EINTR ? -EINTR : 0;
}

static int lead(struct nsn_insane *insane, int consumption, uint64_t deadline)
{
    int result = 0;
    bool polls = consumption == NSN_QOS_CONSUMPTION_POLL;
    bool spins = polls || (consumption == NSN_QOS_CONSUMPTION_ADAPTIVE && insane->spin.budget_ns);
    insane->leader = true;
    if (spins) {
        uint64_t until = polls ? deadline : nsn_now_ns() + insane->spin.budget_ns;
        bool found = spin_for_all(insane, until < deadline ? until : deadline);
        if (!polls && found)
            spin_hit(&insane->spin);
        else if (!polls)
            spin_miss(&insane->spin);
        spins = found || polls;
    }
    if (!spins)
        result = sleep_for_all(insane, deadline);
    insane->leader = false;
    if (insane->followers)
        nsn_insane_wake_all(insane); /* one of them leads now */
    return result;
}

int nsn_insane_wait(struct nsn_insane *insane, int consumption, uint64_t deadline, uint64_t since)
{
    int result = 0;
    insane->waiters++;
    if (insane->leader)
        nsn_insane_follow(insane, deadline);
    else
        result = lead(insane, consumption, deadline);
    insane->waiters--;
    if (insane->shut_down) {
        nsn_insane_wake_all(insane); /* nsn_insane_close() waits for the last waiter */
        return nsn_insane_fail(-ESHUTDOWN, "the session is being closed");
    }
    if (insane->detached_since) {
        uint64_t begin = insane->detached_since > since ? insane->detached_since : since;
        if (nsn_now_ns() - begin > GONE_NS)
            return nsn_insane_fail(-ENOTCONN, "nsnd is gone, and nothing came within 5 s from the programs that this one had "
                                   "met before: %s", insane->detached_words);
    }
    return result;
}

/* --- an event loop that waits ------------------------------------------------------------------------------------- */

static int make_watch(struct nsn_insane *insane)
{
    insane->notice = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    insane->watch = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = insane->notice};
    if (insane->watch < 0 || insane->notice < 0 || epoll_ctl(insane->watch, EPOLL_CTL_ADD, insane->notice, &event) < 0 ||
        watch_session(insane) < 0)
        return nsn_insane_fail(-errno, "no descriptor for an event loop: %s", strerror(errno));
    return 0;
}

int nsn_insane_watch(struct nsn_insane *insane)
{
    int result = nsn_insane_check(insane);
    if (result < 0)
        return result;
    nsn_insane_lock(insane);
    if (insane->watch < 0)
        result = make_watch(insane);
    insane->watching |= result == 0;
    nsn_insane_unlock(insane);
    return result < 0 ? result : insane->watch;
}

int nsn_insane_watch_arm(struct nsn_insane *insane)
{
    if (nsn_insane_check(insane) < 0)
        return 1;
    nsn_insane_lock(insane);
    bool idle = !nsn_insane_take(insane, false) && !nsn_receive_held(insane->session);
    int armed = idle && nsn_arm(insane->session);
    nsn_insane_unlock(insane);
    return armed;
}

void nsn_insane_look(struct nsn_insane *insane)
{
    if (nsn_insane_check(insane) < 0)
        return;
    nsn_insane_lock(insane);
    answer_eventfd(insane->notice);
    nsn_disarm(insane->session);
    nsn_insane_attend(insane, false);
    nsn_insane_take(insane, false);
    nsn_insane_unlock(insane);
}

void nsn_insane_watch_end(struct nsn_insane *insane)
{
    if (nsn_insane_check(insane) < 0)
        return;
    nsn_insane_lock(insane);
    insane->watching = false;
    nsn_insane_unlock(insane);
}

/* --- opening and closing ------------------------------------------------------------------------------------------ */

static uint64_t write_deadline(void)
{
    const char *word = getenv("INSANE_NATS_WRITE_DEADLINE");
    char *end;
    double seconds = word ? strtod(word, &end) : 0;
    return word && end != word && !*end && seconds > 0 && seconds < 1e6 ? (uint64_t)(seconds * 1e9) : WRITE_DEADLINE_NS;
}

static int await_ready(struct nsn_insane *insane)
{
    struct nsn_session *session = insane->session;
    uint64_t deadline = nsn_now_ns() + ATTACH_NS;
    nsn_session_process(session, SPIN_MAX_NS);
    while (nsn_session_state(session) == NSN_CONNECTING) {
        nsn_insane_answer(insane);
        if (nsn_insane_is_relayed(insane))
            return nsn_insane_fail(-EACCES,
                                   "the user has permissions, which memory cannot be shared under: use one without, or "
                                   "send and receive on channel N as a NATS program does, by the subject $INSANE.N");
        if (nsn_now_ns() > deadline)
            return nsn_insane_fail(-ETIMEDOUT, "nsnd (pid %llu) does not answer: is it stopped or overloaded?",
                                   (unsigned long long)insane->node.pid);
        struct pollfd one = {.fd = nsn_session_control_fd(session), .events = POLLIN};
        poll(&one, 1, 20);
        nsn_session_process(session, 0);
    }
    if (nsn_session_refusal(session) == EKEYREJECTED)
        return nsn_insane_fail(-EKEYREJECTED, "the node of application ID %u does not know these credentials: they are to be "
                               "those of a user in [auth.%u] of its nsnd.cfg", insane->options.application_id,
                               insane->options.application_id);
    if (nsn_session_state(session) != NSN_READY)
        return nsn_insane_fail(-ECONNREFUSED, "the node of application ID %u does not let this program in: %s",
                               insane->options.application_id, nsn_session_error(session));
    return 0;
}

static int open_session(struct nsn_insane *insane)
{
    char words[256] = "";
    int result = nsn_node_find(insane->options.application_id, insane->options.nsnd, &insane->node);
    if (result < 0)
        return result;
    struct nsn_session_options options = {
        .socket_path = insane->node.socket,
        .name = insane->options.name,
        .application_id = insane->options.application_id,
        .no_echo = !insane->options.echo,
        .answers = insane->credentials != NULL,
    };
    insane->session = nsn_session_open(&options, words, sizeof words);
    if (!insane->session) {
        bool denied = access(insane->node.socket, W_OK) < 0 && errno == EACCES;
        return nsn_insane_fail(denied ? -EACCES : -ECONNREFUSED,
                               "the node of application ID %u (pid %llu, user ID %llu): %s%s", insane->options.application_id,
                               (unsigned long long)insane->node.pid, (unsigned long long)insane->node.uid, words,
                               denied ? ": run this program as that user, or have that node's nsnd.cfg name this one ([access] "
                                        "users), or choose another l4_port" : "");
    }
    return await_ready(insane);
}

static int prepare(struct nsn_insane *insane)
{
    pthread_condattr_t monotonic;
    pthread_mutex_init(&insane->lock, NULL);
    pthread_mutex_init(&insane->changed_lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&insane->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    insane->watch = insane->notice = -1;
    insane->ready_last = &insane->ready;
    insane->spin = (struct nsn_spin){.budget_ns = SPIN_MAX_NS, .trust = TRUST_FIRST};
    insane->write_deadline_ns = write_deadline();
    insane->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (insane->kick < 0)
        return nsn_insane_fail(-errno, "no descriptor for waking threads: %s", strerror(errno));
    if (nsn_things_init(&insane->streams, sizeof(struct nsn_stream)) < 0 ||
        nsn_things_init(&insane->sources, sizeof(struct nsn_source)) < 0 ||
        nsn_things_init(&insane->sinks, sizeof(struct nsn_sink)) < 0)
        return nsn_insane_fail(-ENOMEM, "no memory for a session");
    return 0;
}

static void free_insane(struct nsn_insane *insane)
{
    if (insane->session) {
        nsn_loans_forget(insane);
        nsn_session_close(insane->session);
    }
    nsn_insane_forget_credentials(insane);
    free(insane->filling);
    while (insane->free_chunks) {
        struct nsn_chunk *chunk = insane->free_chunks;
        insane->free_chunks = chunk->next;
        free(chunk);
    }
    nsn_things_free(&insane->streams);
    nsn_things_free(&insane->sources);
    nsn_things_free(&insane->sinks);
    int fds[3] = {insane->kick, insane->notice, insane->watch};
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    pthread_cond_destroy(&insane->changed);
    pthread_mutex_destroy(&insane->changed_lock);
    pthread_mutex_destroy(&insane->lock);
    free(insane);
}

struct nsn_insane *nsn_insane_open(const struct nsn_insane_options *options)
{
    struct nsn_insane *insane = calloc(1, sizeof *insane);
    if (!insane) {
        nsn_insane_fail(-ENOMEM, "no memory for a session");
        return NULL;
    }
    insane->options = *options;
    int result = prepare(insane);
    if (result == 0)
        result = nsn_insane_introduce(insane);
    if (result == 0)
        result = open_session(insane);
    if (result < 0) {
        free_insane(insane);
        errno = -result;
        return NULL;
    }
    attached(insane);
    insane->options.name = insane->options.user = insane->options.password = insane->options.token = NULL; /* the caller's */
    return insane;
}

void nsn_insane_shut_down(struct nsn_insane *insane)
{
    if (nsn_session_forked(insane->session))
        return;
    nsn_insane_lock(insane);
    insane->shut_down = true;
    nsn_insane_wake_all(insane);
    nsn_insane_unlock(insane);
}

/* Until nobody is in a call that waits, and those who are to read what was published have taken its links. */
static void settle_down(struct nsn_insane *insane, uint64_t wait_ns)
{
    uint64_t deadline = nsn_now_ns() + wait_ns;
    nsn_insane_lock(insane);
    while (insane->waiters) {
        nsn_insane_wake_all(insane);
        nsn_insane_follow(insane, UINT64_MAX);
    }
    while (!nsn_links_taken(insane->session) && nsn_session_state(insane->session) == NSN_READY && nsn_now_ns() < deadline) {
        nsn_session_process(insane->session, SPIN_MAX_NS);
        nsn_insane_unlock(insane);
        struct pollfd one = {.fd = nsn_session_control_fd(insane->session), .events = POLLIN};
        poll(&one, 1, 1);
        nsn_insane_lock(insane);
    }
    nsn_insane_unlock(insane);
}

int nsn_insane_close(struct nsn_insane *insane, uint64_t wait_ns)
{
    if (nsn_session_forked(insane->session)) {
        nsn_session_abandon(insane->session);
        return 0; /* its memory is shared with what threads of the parent were about: it is left */
    }
    if (insane->calling && pthread_equal(insane->caller, pthread_self()))
        return nsn_insane_fail(-EDEADLK, "a session cannot be closed by a callback: let the callback return first");
    nsn_insane_shut_down(insane);
    nsn_callbacks_end(insane);
    settle_down(insane, wait_ns);
    free_insane(insane);
    return 0;
}

uint64_t nsn_insane_max_payload(struct nsn_insane *insane) { return insane->max_payload; }
uint64_t nsn_insane_write_deadline(struct nsn_insane *insane) { return insane->write_deadline_ns; }
int nsn_insane_attached(struct nsn_insane *insane) { return nsn_session_state(insane->session) == NSN_READY; }
int nsn_insane_inherited(struct nsn_insane *insane) { return nsn_session_forked(insane->session); }
