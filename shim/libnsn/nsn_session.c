/* A session's life: opening, attaching, the descriptors to watch, sleeping, closing. */
#include "nsn_session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "nsn_budget.h"
#include "nsn_session_internal.h"

int nsn_fail(struct nsn_session *s, int error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s->error, sizeof s->error, format, arguments);
    va_end(arguments);
    return error;
}

void nsn_post_event(struct nsn_session *s, const struct nsn_event *event)
{
    if (s->event_count == NSN_EVENTS) {
        s->event_first = (s->event_first + 1) % NSN_EVENTS;
        s->event_count--;
        s->events_lost++;
    }
    s->events[(s->event_first + s->event_count++) % NSN_EVENTS] = *event;
}

int nsn_next_event(struct nsn_session *s, struct nsn_event *event)
{
    pthread_mutex_lock(&s->lock);
    int found = s->event_count > 0;
    if (found) {
        *event = s->events[s->event_first];
        s->event_first = (s->event_first + 1) % NSN_EVENTS;
        s->event_count--;
    }
    pthread_mutex_unlock(&s->lock);
    return found;
}

static int connect_patiently(int control, const struct sockaddr_un *address)
{
    struct timeval patience = {.tv_sec = 1}, for_ever = {0};
    int flags = fcntl(control, F_GETFL);
    if (flags < 0 || fcntl(control, F_SETFL, flags & ~O_NONBLOCK) < 0 ||
        setsockopt(control, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) < 0)
        return -1;
    int result = connect(control, (const struct sockaddr *)address, sizeof *address), error = errno;
    if (fcntl(control, F_SETFL, flags) < 0 || setsockopt(control, SOL_SOCKET, SO_SNDTIMEO, &for_ever, sizeof for_ever) < 0)
        return -1;
    errno = error;
    return result;
}

static int connect_control(const char *path, char *error, size_t error_size)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        snprintf(error, error_size, "the control socket's path %s is too long: choose a shorter runtime directory", path);
        return -ENAMETOOLONG;
    }
    strcpy(address.sun_path, path);
    int control = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (control < 0) {
        snprintf(error, error_size, "no socket for talking to nsnd: %s", strerror(errno));
        return -errno;
    }
    int result = connect(control, (struct sockaddr *)&address, sizeof address);
    if (result < 0 && errno == EAGAIN) /* more connections wait to be accepted than there is room for */
        result = connect_patiently(control, &address);
    if (result < 0) {
        result = -errno;
        snprintf(error, error_size, "nsnd does not answer at %s: %s", path, strerror(-result));
        close(control);
        return result;
    }
    return control;
}

static void free_session(struct nsn_session *s)
{
    while (s->outs)
        nsn_out_drop(s, s->outs);
    nsn_in_drop_all(s);
    for (uint32_t i = 0; i < s->large_room; i++) /* not released: they end with the session */
        if (s->larges[i].segment)
            nsn_segment_in_drop(s->larges[i].segment);
        else
            free(s->larges[i].copy);
    if (s->control >= 0)
        close(s->control);
    if (s->relay >= 0)
        close(s->relay);
    if (s->bell >= 0 && s->bell != s->own_bell)
        close(s->bell);
    if (s->spare >= 0)
        close(s->spare);
    nsn_ringer_close(&s->ringer);
    while (s->outgoing) {
        struct nsn_outgoing *packet = s->outgoing;
        s->outgoing = packet->next;
        free(packet);
    }
    while (s->sent) {
        struct nsn_batch *batch = s->sent;
        s->sent = batch->next;
        free(batch);
    }
    free(s->batch);
    nsn_subscriptions_free(s);
    nsn_barriers_free(s);
    nsn_pass_on_free(s);
    nsn_log_reader_close(&s->log);
    nsn_others_free(s);
    nsn_own_place_free(s);
    nsn_slots_unmap(&s->map);
    if (s->routes)
        nsn_routes_free(s->routes);
    if (s->pool)
        nsn_pool_free(s->pool);
    free(s->plan);
    free(s->groups);
    free(s->active);
    free(s->active_stamp);
    free(s->larges);
    if (s->fork_canary)
        munmap(s->fork_canary, 4096);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

struct nsn_session *nsn_session_open(const struct nsn_session_options *options, char *error, size_t error_size)
{
    struct nsn_session *s = calloc(1, sizeof *s);
    if (!s) {
        snprintf(error, error_size, "no memory for a session");
        return NULL;
    }
    pthread_mutex_init(&s->lock, NULL);
    s->options = *options;
    snprintf(s->name, sizeof s->name, "%s", options->name ? options->name : "");
    snprintf(s->socket_path, sizeof s->socket_path, "%s", options->socket_path);
    s->options.name = s->name;
    s->options.socket_path = s->socket_path;
    if (!s->options.write_deadline_ns)
        s->options.write_deadline_ns = NSN_WRITE_DEADLINE_NS;
    if (!s->options.pending_size)
        s->options.pending_size = NSN_PENDING_SIZE;
    s->protocol = NSN_PROTOCOL_VERSION;
    s->control = s->bell = s->spare = s->own_bell = s->own_segment = s->relay = -1;
    nsn_ringer_init(&s->ringer);
    s->outgoing_last = &s->outgoing;
    s->sent_last = &s->sent;
    s->passing_last = &s->passing;
    s->large_free = UINT32_MAX;
    s->over_budget_slot = UINT32_MAX;
    s->routes = nsn_routes_new(0);
    s->pool = nsn_pool_new();
    void *canary = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (canary != MAP_FAILED) {
        madvise(canary, 4096, MADV_WIPEONFORK);
        s->fork_canary = canary;
        *s->fork_canary = 1;
    }
    if (!s->routes || !s->pool || !s->fork_canary ||
        getrandom(s->identity, sizeof s->identity, 0) != sizeof s->identity ||
        getrandom(&s->random, sizeof s->random, 0) != sizeof s->random) {
        snprintf(error, error_size, "no memory for a session");
        free_session(s);
        return NULL;
    }
    s->random |= 1;
    if (!s->options.budget && nsn_budget_default(&s->options.budget, error, error_size) < 0) {
        free_session(s);
        return NULL;
    }
    s->pool_share = s->options.budget;
    if (!s->options.link_limit)
        s->options.link_limit = s->options.budget / 4 < NSN_LINK_LIMIT ? s->options.budget / 4 : NSN_LINK_LIMIT;
    nsn_routes_on_parting(s->routes, nsn_pass_on_parting, s);
    s->control = connect_control(s->socket_path, error, error_size);
    if (s->control < 0) {
        free_session(s);
        return NULL;
    }
    if (nsn_control_hello(s) < 0) {
        snprintf(error, error_size, "%s", s->error);
        free_session(s);
        return NULL;
    }
    return s;
}

void nsn_session_close(struct nsn_session *s)
{
    if (nsn_in_child(s)) {
        nsn_session_abandon(s);
        return;
    }
    pthread_mutex_lock(&s->lock);
    if (s->control >= 0) {
        nsn_interest_flush(s);
        nsn_control_flush(s);
        struct nsn_packet goodbye = {NSN_PROTOCOL_MAGIC, NSN_GOODBYE, s->protocol};
        nsn_control_send(s, &goodbye, sizeof goodbye, -1);
    }
    s->state = NSN_CLOSED;
    pthread_mutex_unlock(&s->lock);
    free_session(s);
}

/* The mappings of links, pool and segments are not in a child (MADV_DONTFORK): touching or unmapping them is not possible, so
 * their bookkeeping is left behind; the descriptors are closed. */
void nsn_session_abandon(struct nsn_session *s)
{
    if (s->control >= 0)
        close(s->control);
    if (s->relay >= 0)
        close(s->relay);
    if (s->own_bell >= 0)
        close(s->own_bell);
    if (s->bell >= 0 && s->bell != s->own_bell)
        close(s->bell);
    if (s->spare >= 0)
        close(s->spare);
    nsn_ringer_close(&s->ringer);
    nsn_log_reader_close(&s->log);
    s->control = s->bell = s->spare = s->own_bell = s->relay = -1;
    nsn_pool_abandon(s->pool);
    s->pool = NULL;
    s->state = NSN_CLOSED;
}

int nsn_session_state(struct nsn_session *s) { return __atomic_load_n(&s->state, __ATOMIC_RELAXED); }
const char *nsn_session_error(struct nsn_session *s) { return s->error; }
int nsn_session_control_fd(struct nsn_session *s) { return s->control; }
int nsn_session_bell_fd(struct nsn_session *s) { return s->bell; }
int nsn_session_forked(struct nsn_session *s) { return nsn_in_child(s); }
int nsn_session_unsent(struct nsn_session *s) { return s->outgoing != NULL; }

int nsn_session_info(struct nsn_session *s, struct nsn_session_info *info)
{
    pthread_mutex_lock(&s->lock);
    *info = (struct nsn_session_info){.client_id = s->client_id, .max_payload = s->max_payload, .slot = s->slot,
                                      .generation = s->generation, .node_pid = s->node_pid};
    memcpy(info->version, s->version, sizeof info->version);
    memcpy(info->directory, s->directory, sizeof info->directory);
    pthread_mutex_unlock(&s->lock);
    return 0;
}

int nsn_session_challenge(struct nsn_session *s, char *nonce, size_t nonce_size)
{
    pthread_mutex_lock(&s->lock);
    int challenged = s->state == NSN_CONNECTING && s->challenged;
    if (challenged)
        snprintf(nonce, nonce_size, "%s", s->nonce);
    pthread_mutex_unlock(&s->lock);
    return challenged;
}

int nsn_session_answer(struct nsn_session *s, const uint8_t *json, size_t length)
{
    pthread_mutex_lock(&s->lock);
    int result;
    if (s->state != NSN_CONNECTING || !s->challenged)
        result = nsn_fail(s, -EINVAL, "nsnd does not wait for credentials");
    else
        result = nsn_control_credentials(s, json, length);
    pthread_mutex_unlock(&s->lock);
    return result;
}

int nsn_session_relay(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    int relay = s->relay;
    s->relay = -1;
    pthread_mutex_unlock(&s->lock);
    return relay;
}

int nsn_session_refusal(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    int refusal = s->state == NSN_REFUSED_STATE ? s->refusal : 0;
    pthread_mutex_unlock(&s->lock);
    return refusal;
}

int nsn_session_counters(struct nsn_session *s, struct nsn_counters *counters)
{
    pthread_mutex_lock(&s->lock);
    *counters = s->counters;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

int nsn_session_process(struct nsn_session *s, uint64_t spin_ns)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    uint64_t until = spin_ns ? nsn_now_ns() + spin_ns : 0;
    int packets;
    for (;;) {
        nsn_interest_flush(s);
        packets = nsn_control_flush(s);
        if (packets >= 0)
            packets = nsn_control_receive(s);
        if (packets || s->control < 0 || !until || nsn_now_ns() > until)
            break;
        nsn_cpu_relax();
    }
    if (packets >= 0 && s->control < 0)
        packets = s->state == NSN_REFUSED_STATE ? -ECONNREFUSED : -ENOTCONN;
    if (s->page) {
        nsn_out_check_taken(s);
        nsn_ghosts_step(s);
        if (s->unrung)
            nsn_out_ring_again(s);
    }
    pthread_mutex_unlock(&s->lock);
    return packets > 0 ? 1 : packets;
}

int nsn_session_reattach(struct nsn_session *s, const char *socket_path)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    int result = 0;
    if (s->control < 0) {
        snprintf(s->socket_path, sizeof s->socket_path, "%s", socket_path);
        result = connect_control(s->socket_path, s->error, sizeof s->error);
        if (result >= 0) {
            s->control = result;
            s->state = NSN_CONNECTING;
            result = nsn_control_hello(s);
            if (result < 0) {
                close(s->control);
                s->control = -1;
                s->state = NSN_DETACHED;
            }
        }
    }
    pthread_mutex_unlock(&s->lock);
    return result;
}

int nsn_session_accept_loss(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    int result = s->state == NSN_LOST ? 0 : -EINVAL;
    if (!result)
        s->state = NSN_READY;
    pthread_mutex_unlock(&s->lock);
    return result;
}

int nsn_ping(struct nsn_session *s, uint64_t token)
{
    pthread_mutex_lock(&s->lock);
    struct nsn_ping ping = {.packet = {NSN_PROTOCOL_MAGIC, NSN_PING, s->protocol}, .token = token};
    int result = s->state == NSN_READY ? nsn_control_send(s, &ping, sizeof ping, -1) : -ENOTCONN;
    pthread_mutex_unlock(&s->lock);
    return result;
}

/* --- sleep -------------------------------------------------------------------------------------------------------- */

/* A queue message that waits to be passed on does not keep it awake: the full member rings when it has read. */
static bool arm(struct nsn_session *s)
{
    nsn_pass_on_waiting(s);
    nsn_sleep_begin(s->page, &s->sleep_number);
    if ((s->passing_bytes >= NSN_PASSING_BYTES || !nsn_in_pending(s)) && !s->held)
        return true;
    nsn_sleep_end(s->page, &s->sleep_number);
    return false;
}

int nsn_arm(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    int armed = s->page ? arm(s) : 1;
    pthread_mutex_unlock(&s->lock);
    return armed;
}

void nsn_disarm(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    if (s->page) {
        nsn_sleep_end(s->page, &s->sleep_number);
        nsn_bell_answer(s->bell);
    }
    pthread_mutex_unlock(&s->lock);
}

int nsn_doze(struct nsn_session *s, uint64_t timeout_ns)
{
    if (!nsn_arm(s))
        return 1;
    pthread_mutex_lock(&s->lock);
    uint64_t now = nsn_now_ns(), due = nsn_pass_on_due(s);
    pthread_mutex_unlock(&s->lock);
    bool is_due = due <= now || due - now < timeout_ns;
    if (is_due)
        timeout_ns = due > now ? due - now : 0;
    struct pollfd fds[2] = {{.fd = s->bell, .events = POLLIN}, {.fd = s->control, .events = POLLIN}};
    struct timespec timeout = {(time_t)(timeout_ns / 1000000000u), (long)(timeout_ns % 1000000000u)};
    int ready = ppoll(fds, 2, &timeout, NULL);
    if (ready > 0 && fds[0].revents)
        nsn_disarm(s);
    return ready > 0 || is_due;
}

int nsn_trim(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    int more = 0;
    if (s->page) {
        for (struct nsn_peer_in *peer = s->ins; peer; peer = peer->next) {
            if (!nsn_link_in_empty(peer->link) || !nsn_link_in_trim_begin(peer->link))
                continue;
            nsn_fence(); /* pairs with the fence at the start of every publish: it sees the trim number, or we see it inside */
            bool outside = nsn_load_acquire(&peer->page->publishing) == 0;
            nsn_link_in_trim_end(peer->link, outside);
            more |= !outside;
        }
        more |= nsn_memory_trim(s) > 0;
    }
    pthread_mutex_unlock(&s->lock);
    return more;
}
