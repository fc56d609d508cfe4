/* The relay of one client with permissions. The last byte of the input says how many pairs of bytes in front of it, read from
 * the end on, say how the rest, which is what the client says, is cut, what the fabric answers and has for the client, and when
 * other permissions come. The session is a stand-in that is told what the relay lets through, and looks whether it may, by
 * rules that are written here once more. */
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../nsnd/relay/nsn_permissions.h"
#include "../../nsnd/relay/nsn_relay.h"
#include "fuzz.h"
#include "nsn_session.h"
#include "nsn_shared.h"
#include "nsn_subject.h"

#define CLIENT 1000
#define SUBSCRIPTIONS 20
#define NAME_MOST 4200
#define BLOCK (400u << 10) /* a large message */
#define TAG 16
#define PENDING_MOST (5u << 20) /* of bytes that wait for the client: 4 MiB, a message, and what it says of a short input */

struct nsn_session {
    int unused;
};

struct heard {
    bool used, draining;
    uint32_t sid;
    uint64_t most, delivered;
    size_t pattern_length, queue_length;
    char pattern[NAME_MOST], queue[NAME_MOST];
};

/* What others publish. Some cannot stand in a line. */
static const char *const subjects[] = {"hear.x", "hear.not", "hear.no.y", "may.x", "not", "q.a", "hear.\r\nMSG", "hear.1 2"};
static const char *const replies[] = {"", "reply", "a b", "hear.x"};

static struct nsn_session session;
static struct nsn_relay_options *options;
static struct nsn_session_options asks; /* who may have a message */
static struct nsn_permissions *rules[2]; /* 0: everything; 1: some */
static struct heard all[SUBSCRIPTIONS];
static struct input input, decisions;
static uint8_t secret[TAG], large[BLOCK], plain[TAG];
static uint64_t clock_ns;
static uint32_t held, barriers[8];
static int rule, connecting, state, closed;
static bool opened, asked[4];

/* Zero when all are used up. */
static uint8_t decide(void) { return decisions.at < decisions.end ? *--decisions.end : 0; }

/* --- what is allowed, once more ------------------------------------------------------------------------------------- */

static bool begins_with(const char *text, size_t length, const char *with)
{
    return length > strlen(with) && memcmp(text, with, strlen(with)) == 0;
}

static bool equals(const char *text, size_t length, const char *other)
{
    return length == strlen(other) && memcmp(text, other, length) == 0;
}

static bool may_say(const char *subject, size_t length)
{
    if (begins_with(subject, length, "_GR_.") || begins_with(subject, length, "$GR.") || begins_with(subject, length, "$NRG."))
        return false;
    for (int i = 1; i < 4; i++)
        if (asked[i] && equals(subject, length, replies[i]))
            return true;
    if (!rule)
        return true;
    return begins_with(subject, length, "may.") && !equals(subject, length, "may.not") &&
           !begins_with(subject, length, "may.no.");
}

static bool is_secret(const char *subject, size_t length)
{
    return rule && !(begins_with(subject, length, "hear.") && !equals(subject, length, "hear.not") &&
                     !begins_with(subject, length, "hear.no.")) && !begins_with(subject, length, "q.");
}

static bool may_listen(const char *pattern, size_t length, const char *queue, size_t queue_length)
{
    if (!rule)
        return true;
    if (begins_with(pattern, length, "hear."))
        return !equals(pattern, length, "hear.not") && !begins_with(pattern, length, "hear.no.");
    return begins_with(pattern, length, "q.") && !equals(pattern, length, "q.>") && !memchr(pattern + 2, '.', length - 2) &&
           begins_with(queue, queue_length, "g.") && !memchr(queue + 2, '.', queue_length - 2);
}

static void make_rules(void)
{
    static const struct {
        int list;
        const char *pattern, *queue;
    } some[] = {{NSN_PUBLISH_ALLOW, "may.>", ""}, {NSN_PUBLISH_DENY, "may.not", ""}, {NSN_PUBLISH_DENY, "may.no.>", ""},
                {NSN_SUBSCRIBE_ALLOW, "hear.>", ""}, {NSN_SUBSCRIBE_ALLOW, "q.*", "g.*"}, {NSN_SUBSCRIBE_DENY, "hear.not", ""},
                {NSN_SUBSCRIBE_DENY, "hear.no.>", ""}};
    for (int i = 0; i < 2; i++)
        MUST(rules[i] = nsn_permissions_new());
    for (size_t i = 0; i < sizeof some / sizeof *some; i++)
        MUST(nsn_permissions_add(rules[1], some[i].list, some[i].pattern, strlen(some[i].pattern), some[i].queue,
                                 strlen(some[i].queue)) == 0);
    nsn_permissions_responses(rules[1], 2, 1000000000u);
}

/* --- the client ----------------------------------------------------------------------------------------------------- */

static uint64_t stand_in_now(void) { return clock_ns += 1000; }

static ssize_t stand_in_recv(void *bytes, size_t most)
{
    uint8_t how = decide();
    if (how % 8 == 7) {
        errno = how & 8 ? EINTR : EAGAIN;
        return -1;
    }
    size_t length;
    const uint8_t *given = take_bytes(&input, how ? how : 65536, &length);
    MUST(length <= most);
    memcpy(bytes, given, length);
    return (ssize_t)length;
}

static ssize_t stand_in_send(const void *bytes, size_t length)
{
    uint8_t how = decide();
    MUST(!closed && length && length <= PENDING_MOST);
    MUST(!memmem(bytes, length, secret, TAG));
    if (how >= 0xf0) {
        errno = how == 0xff ? EPIPE : how & 1 ? EINTR : EAGAIN;
        return -1;
    }
    return (ssize_t)(how && how < length ? how : length);
}

static int stand_in_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    uint8_t how = decide();
    bool ready = how & 1;
    for (nfds_t i = 0; i < count; i++)
        fds[i].revents = ready ? fds[i].events : 0;
    if (!ready)
        clock_ns += timeout < 0 ? 1000000000u : (uint64_t)timeout * 1000000u;
    if (how % 16 == 6) {
        rule = 1;
        nsn_relay_permit(options, rules[rule]);
    }
    return ready ? (int)count : 0;
}

static int stand_in_close(int fd)
{
    MUST(fd == CLIENT && !closed++);
    return 0;
}

/* --- the session ---------------------------------------------------------------------------------------------------- */

static struct nsn_session *stand_in_open(const struct nsn_session_options *given)
{
    asks = *given;
    uint8_t how = decide();
    connecting = how & 3;
    state = how == 0xff ? NSN_REFUSED_STATE : NSN_READY;
    opened = how != 0xfe;
    return opened ? &session : NULL;
}

static int stand_in_state(void) { return connecting ? NSN_CONNECTING : state; }

static int stand_in_process(void)
{
    connecting -= connecting > 0;
    return 0;
}

static void stand_in_end(void)
{
    MUST(opened);
    opened = false;
}

static struct heard *find_heard(uint32_t sid)
{
    for (int i = 0; i < SUBSCRIPTIONS; i++)
        if (all[i].used && all[i].sid == sid)
            return &all[i];
    return NULL;
}

static int stand_in_subscribe(uint32_t sid, const char *pattern, size_t length, const char *queue, size_t queue_length)
{
    MUST(opened && !find_heard(sid) && nsn_pattern_valid(pattern, length) && length < NAME_MOST && queue_length < NAME_MOST);
    MUST(may_listen(pattern, length, queue, queue_length));
    struct heard *one = all;
    while (one < all + SUBSCRIPTIONS && one->used)
        one++;
    if (one == all + SUBSCRIPTIONS || decide() == 0xff)
        return -EINVAL;
    one->used = true;
    one->draining = false;
    one->sid = sid;
    one->most = one->delivered = 0;
    memcpy(one->pattern, pattern, one->pattern_length = length);
    memcpy(one->queue, queue, one->queue_length = queue_length);
    return 0;
}

static int stand_in_unsubscribe(uint32_t sid, uint64_t most)
{
    struct heard *one = find_heard(sid);
    if (one && most)
        MUST(most > one->delivered); /* else it would be gone at once, and the relay not know */
    if (one && !(one->most = most))
        one->used = false;
    return one ? 0 : -ENOENT;
}

static int stand_in_drain(uint32_t sid)
{
    struct heard *one = find_heard(sid);
    if (one)
        one->draining = true;
    return one ? 0 : -ENOENT;
}

static int stand_in_publish(const char *subject, size_t length, const char *reply, size_t reply_length, const uint8_t *headers,
                            size_t header_length, const uint8_t *payload, size_t payload_length)
{
    MUST(opened && length && header_length + payload_length <= options->max_payload && payload == headers + header_length);
    MUST(may_say(subject, length));
    MUST(!begins_with(reply, reply_length, "_R_.") && !begins_with(reply, reply_length, "$JS.ACK."));
    MUST(!memchr(subject, '\r', length) && !memchr(reply, '\r', reply_length));
    read_all(subject, length);
    read_all(reply, reply_length);
    read_all(headers, header_length + payload_length);
    static const int answers[] = {0, 1, -EAGAIN, -EALREADY, -ENOBUFS, -EINVAL};
    return answers[decide() % 6];
}

static uint8_t *put_bytes(uint8_t *at, const void *bytes, size_t length)
{
    memcpy(at, bytes, length);
    return at + length;
}

/* A message for each subscription that its subject matches, as often as there is room. */
static int stand_in_receive(struct nsn_message *messages, int most, uint8_t *blob, size_t blob_size)
{
    uint8_t how = decide(), more = how ? decide() : 0;
    MUST(held == 0 && blob_size > 1024);
    if (how % 4 != 1)
        return how == 0xfe ? -ECHILD : 0;
    const char *subject = subjects[how / 4 % 8], *reply = replies[how / 32 % 4];
    size_t length = strlen(subject), reply_length = strlen(reply);
    bool is_large = more >= 0xf8;
    uint8_t *at = put_bytes(put_bytes(blob, subject, length), reply, reply_length);
    struct nsn_message message = {.subject_length = (uint32_t)length, .reply_length = (uint32_t)reply_length,
                                  .header_length = more % 3 ? 0 : 12, .flags = is_large ? NSN_MESSAGE_LARGE : 0, .large = 5,
                                  .payload_length = is_large ? BLOCK - 12 : TAG};
    at = put_bytes(at, "NATS/1.0\r\n\r\n", message.header_length);
    put_bytes(at, is_secret(subject, length) ? secret : plain, TAG);
    memcpy(large + 12, is_secret(subject, length) ? secret : plain, TAG);
    int count = 0;
    for (struct heard *one = all; one < all + SUBSCRIPTIONS && count < most; one++) {
        if (!one->used || !nsn_pattern_matches(one->pattern, one->pattern_length, subject, length))
            continue;
        if (!asks.may_have(asks.context, &(struct nsn_receiver){.subject = subject, .queue = one->queue,
                                                                .subject_length = length,
                                                                .queue_length = one->queue_length}))
            continue;
        messages[count] = message;
        messages[count].sid = one->sid;
        if (++one->delivered == one->most)
            messages[count].flags |= NSN_MESSAGE_LAST;
        one->used = one->delivered != one->most;
        count++;
    }
    held = is_large ? (uint32_t)count : 0;
    asked[how / 32 % 4] |= count > 0;
    return count;
}

static const uint8_t *stand_in_large(uint32_t handle)
{
    MUST(handle == 5 && held);
    return large;
}

static void stand_in_release(uint32_t handle) { MUST(handle == 5 && held-- > 0); }

static int stand_in_barrier(void)
{
    for (int token = 1; token <= 8; token++)
        if (!barriers[token - 1]) {
            barriers[token - 1] = 1 + decide() % 4;
            return token;
        }
    return -ENOMEM;
}

static int stand_in_done(int token)
{
    if (token < 1 || !barriers[token - 1])
        return -ENOENT;
    return --barriers[token - 1] == 0;
}

static void stand_in_cancel(int token)
{
    if (token >= 1)
        barriers[token - 1] = 0;
}

static int stand_in_event(struct nsn_event *event)
{
    uint8_t how = decide();
    *event = (struct nsn_event){.kind = how};
    return how && how <= NSN_EVENT_LAME_DUCK && how != NSN_EVENT_SLOW_CONSUMER;
}

/* --- the relay, with these ------------------------------------------------------------------------------------------ */

#define nsn_now_ns() stand_in_now()
#define recv(fd, bytes, most, flags) stand_in_recv(bytes, most)
#define send(fd, bytes, length, flags) stand_in_send(bytes, length)
#define poll(fds, count, timeout) stand_in_poll(fds, count, timeout)
#define shutdown(fd, how) ((void)(how))
#define close(fd) stand_in_close(fd)
#define nsn_session_open(given, words, size) ((void)(words), stand_in_open(given))
#define nsn_session_close(s) stand_in_end()
#define nsn_session_state(s) ((void)(s), stand_in_state())
#define nsn_session_process(s, spin) stand_in_process()
#define nsn_session_control_fd(s) 1001
#define nsn_session_bell_fd(s) 1002
#define nsn_session_info(s, info) ((void)(info))
#define nsn_session_refusal(s) EKEYREJECTED
#define nsn_session_unsent(s) (decide() & 1)
#define nsn_links_taken(s) 1
#define nsn_subscribe(s, ...) stand_in_subscribe(__VA_ARGS__)
#define nsn_unsubscribe(s, ...) stand_in_unsubscribe(__VA_ARGS__)
#define nsn_drain(s, sid) stand_in_drain(sid)
#define nsn_publish(s, ...) stand_in_publish(__VA_ARGS__)
#define nsn_publish_give_up(s) ((void)0)
#define nsn_session_count_dropped(s) ((void)0)
#define nsn_session_error(s) "no memory"
#define nsn_receive(s, messages, most, blob, size, spin) stand_in_receive(messages, most, blob, size)
#define nsn_large(s, handle) stand_in_large(handle)
#define nsn_large_release(s, handle) stand_in_release(handle)
#define nsn_receive_held(s) 0
#define nsn_arm(s) 1
#define nsn_disarm(s) ((void)0)
#define nsn_trim(s) 0
#define nsn_barrier_begin(s) stand_in_barrier()
#define nsn_barrier_done(s, token) stand_in_done(token)
#define nsn_barrier_cancel(s, token) stand_in_cancel(token)
#define nsn_next_event(s, event) stand_in_event(event)

#include "../../nsnd/relay/nsn_relay.c"
#include "../../nsnd/relay/nsn_relay_lines.c"
#include "../../nsnd/relay/nsn_relay_out.c"
#include "../../nsnd/relay/nsn_relay_publish.c"
#include "../../nsnd/relay/nsn_relay_subscriptions.c"
#include "../../nsnd/relay/nsn_relays.c"

/* The client cannot know it. */
static void make_secret(const uint8_t *data, size_t size)
{
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ data[i]) * 1099511628211u;
    for (size_t i = 0; i < TAG; i++, hash = (hash ^ i) * 1099511628211u)
        secret[i] = (uint8_t)(hash >> 32) | 0x80;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct nsn_relays *relays;
    if (!rules[0])
        make_rules();
    if (!relays)
        MUST(relays = nsn_relays_new());
    size_t rest = size ? size - 1 : 0, decided = size ? 2u * data[rest] : 0;
    const uint8_t *cut = data + rest - (decided < rest ? decided : rest);
    input = (struct input){data, cut};
    decisions = (struct input){cut, data + rest};
    make_secret(data, size);
    memset(all, 0, sizeof all);
    memset(barriers, 0, sizeof barriers);
    clock_ns = 1000000000u;
    held = 0;
    memset(asked, 0, sizeof asked);
    closed = 0;
    rule = !(decide() & 1);
    struct nsn_relay_options given = {.socket_path = "", .name = "", .info = "{}", .lame_duck = "{\"ldm\":true}",
                                      .application_id = 1,
                                      .subscriptions_max = SUBSCRIPTIONS, .max_payload = 200, .budget = 1 << 20,
                                      .write_deadline_ns = 10000000000u,
                                      .permissions = rules[rule],
                                      .relays = relays};
    options = &given;
    nsn_relay_run(CLIENT, &given);
    MUST(closed == 1 && !opened);
    return 0;
}
