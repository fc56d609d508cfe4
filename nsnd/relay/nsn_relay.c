/* A relay's life: greeting, attaching, serving, its end. */
#include "nsn_relay.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nsn_relay_internal.h"

#define SAID_MAX (2 * OUT_MAX)    /* above, nothing more is taken from the client either: what it says is answered */
#define CONNECT_NS 2000000000ull  /* for the client's CONNECT, as a NATS server waits */
#define ATTACH_NS 5000000000ull
#define LAST_NS 2000000000ull     /* at the end, for subscribers to take what was published */
#define HAND_OVER_MS 1
#define LOOK_MS 16                /* longest sleep between looks at what nobody rings for */
#define AGAIN_MS 50               /* what waits for the fabric is tried again that often, rung or not */
#define IDLE_MS 1000

/* INFO is sent, CONNECT comes. */
static bool greeted(struct nsn_relay *r)
{
    uint64_t until = nsn_now_ns() + CONNECT_NS;
    nsn_relay_say(r, "INFO ");
    nsn_relay_put(r, r->options->info, strlen(r->options->info));
    nsn_relay_put(r, " \r\n", 3);
    nsn_relay_send(r);
    for (;;) {
        uint64_t now = nsn_now_ns();
        if (now > until) {
            nsn_relay_fail(r, "Authentication Timeout");
            return false;
        }
        struct pollfd one = {.fd = r->client, .events = POLLIN};
        poll(&one, 1, (int)((until - now) / 1000000u) + 1);
        nsn_relay_read(r);
        enum nsn_relay_step step = nsn_relay_take_line(r);
        if (step == DONE || r->over)
            return !r->over;
        if (r->ended)
            return false;
    }
}

static bool attached(struct nsn_relay *r)
{
    char words[256];
    struct nsn_session_options options = {
        .socket_path = r->options->socket_path,
        .name = r->options->name,
        .application_id = r->options->application_id,
        .no_echo = r->no_echo,
        .budget = r->options->budget,
        .write_deadline_ns = r->options->write_deadline_ns,
        .may_have = nsn_relays_may_have,
        .context = r,
    };
    r->session = nsn_session_open(&options, words, sizeof words);
    if (!r->session)
        return false;
    uint64_t until = nsn_now_ns() + ATTACH_NS;
    while (nsn_session_state(r->session) == NSN_CONNECTING && nsn_now_ns() < until) {
        struct pollfd one = {.fd = nsn_session_control_fd(r->session), .events = POLLIN};
        poll(&one, 1, 100);
        nsn_session_process(r->session, 0);
    }
    if (nsn_session_state(r->session) != NSN_READY)
        return false;
    nsn_session_info(r->session, &r->info);
    nsn_relays_add(r->options->relays, r);
    return true;
}

/* nsnd, and what happened to the session. */
static void attend(struct nsn_relay *r)
{
    struct nsn_event event;
    nsn_session_process(r->session, 0);
    while (nsn_next_event(r->session, &event)) {
        if (event.kind == NSN_EVENT_SLOW_CONSUMER)
            r->over = true; /* as a NATS server ends it */
        else if (event.kind == NSN_EVENT_INTEREST)
            nsn_relay_say(r, "-ERR 'maximum subscriptions exceeded'\r\n");
        else if (event.kind == NSN_EVENT_LAME_DUCK)
            nsn_relay_say(r, "INFO %s \r\n", r->options->lame_duck);
    }
    if (nsn_session_state(r->session) == NSN_READY)
        return;
    if (nsn_session_refusal(r->session) == EKEYREJECTED)
        nsn_relay_say(r, "-ERR 'Authorization Violation'\r\n");
    r->over = true;
}

/* What nobody rings for: that another publisher is outside its publish, for which barriers wait, and messages that are held
 * back for its sake. That takes a microsecond, unless the other has been stopped right there: it is looked for less and
 * less. */
static bool waits_for_publishers(const struct nsn_relay *r)
{
    return r->ending || r->pong || nsn_receive_held(r->session);
}

static int sleep_ms(struct nsn_relay *r, bool waits, bool full)
{
    if (!full && waits_for_publishers(r)) {
        int ms = r->look_ms;
        r->look_ms = ms ? ms < LOOK_MS ? 2 * ms : LOOK_MS : 1;
        return ms;
    }
    return waits ? AGAIN_MS : r->trimmed && !full ? -1 : IDLE_MS;
}

/* Until the client, the fabric or nsnd has something, or there is room in a link that a publish waits for: its consumer
 * rings. */
static void sleep_until_due(struct nsn_relay *r, bool waits)
{
    bool full = nsn_relay_is_full(r);
    if (!full && (nsn_relay_holds(r) || !nsn_arm(r->session)))
        return;
    short events = (short)((waits || r->ended ? 0 : POLLIN) | (nsn_bytes_length(&r->out) ? POLLOUT : 0));
    struct pollfd fds[3] = {
        {.fd = events ? r->client : -1, .events = events}, /* that it has hung up would be said again and again */
        {.fd = nsn_session_control_fd(r->session), .events = POLLIN},
        {.fd = nsn_session_bell_fd(r->session), .events = POLLIN},
    };
    int ms = sleep_ms(r, waits, full), ready = poll(fds, 3, ms);
    nsn_disarm(r->session);
    if (ready > 0) {
        r->look_ms = 0;
        r->trimmed = false;
    } else if (ms == IDLE_MS) {
        r->trimmed = nsn_trim(r->session) == 0;
    }
}

void nsn_relay_permit(struct nsn_relay_options *options, const struct nsn_permissions *permissions)
{
    __atomic_store_n(&options->permissions, permissions, __ATOMIC_RELEASE); /* pairs with nsn_relay_permissions() */
}

static enum nsn_relay_step take_next(struct nsn_relay *r)
{
    if (nsn_bytes_length(&r->out) <= SAID_MAX)
        return nsn_relay_take_line(r);
    r->waits_since = 0; /* a publish at the front waits for its own client now, and nobody is to be given up for that */
    return WAIT;
}

static void serve(struct nsn_relay *r)
{
    while (!r->over && !r->broken) {
        nsn_relay_renew_permissions(r);
        bool busy = nsn_relay_deliver(r);
        nsn_relay_read(r);
        enum nsn_relay_step step = DONE;
        for (int i = 0; i < BATCH && step == DONE && !r->over; i++)
            step = take_next(r);
        attend(r);
        if (!nsn_relay_holds(r))
            nsn_relay_end_subscriptions(r);
        nsn_relay_send(r);
        if (step == MORE && r->ended)
            break;
        if (busy || step == DONE || r->over)
            r->look_ms = 0;
        else
            sleep_until_due(r, step == WAIT);
    }
}

/* Its subscribers are to have what the client published. */
static void hand_over(struct nsn_session *session)
{
    uint64_t until = nsn_now_ns() + LAST_NS;
    while (nsn_session_state(session) == NSN_READY && nsn_now_ns() < until &&
           (nsn_session_unsent(session) || !nsn_links_taken(session))) {
        struct pollfd one = {.fd = nsn_session_control_fd(session), .events = POLLIN};
        poll(&one, 1, HAND_OVER_MS);
        nsn_session_process(session, 0);
    }
}

static void end(struct nsn_relay *r)
{
    nsn_relay_send(r);
    shutdown(r->client, SHUT_WR);
    if (r->session) {
        hand_over(r->session);
        nsn_session_close(r->session);
        nsn_relays_remove(r->options->relays, r);
    }
    nsn_relay_free_subscriptions(r);
    nsn_bytes_free(&r->in);
    nsn_bytes_free(&r->out);
    nsn_replies_free(r->replies);
    close(r->client);
    free(r);
}

void nsn_relay_run(int client, const struct nsn_relay_options *options)
{
    struct nsn_relay *r = calloc(1, sizeof *r);
    struct nsn_replies *replies = nsn_replies_new();
    if (!r || !replies || nsn_table_init(&r->by_sid) < 0) {
        free(r);
        nsn_replies_free(replies);
        close(client);
        return;
    }
    r->options = options;
    r->may = nsn_relay_permissions(options);
    r->replies = replies;
    r->client = client;
    r->last_subscription = &r->subscriptions;
    if (greeted(r) && attached(r))
        serve(r);
    end(r);
}
