/* INSANE's primitives on a session of the fabric, any number of them in one process: what nsn/nsn.h has for one program, and
 * the Python package for each of its Session objects.
 *
 * Errors are negative errnos; nsn_insane_error() has the words of this thread's last one. Every function may be called from
 * any thread, but for open, close and abandon. Times are in nanoseconds; UINT64_MAX is for ever.
 */
#ifndef NSN_INSANE_H
#define NSN_INSANE_H

#include <stddef.h>
#include <stdint.h>

struct nsn_buffer;
struct nsn_options;
struct nsn_insane;

struct nsn_insane_options {
    uint32_t application_id;      /* 1 to 65535 */
    const char *name;             /* shown in status */
    int echo;                     /* own sinks get what own sources emit */
    char *const *nsnd;            /* how to start nsnd: a command and arguments, then NULL; or NULL: it is looked for */
    const char *user, *password;  /* both, or the token, where the application ID asks for credentials; else NULL */
    const char *token;
};

#define NSN_CREDENTIAL_MAX 256    /* bytes of a user, a password or a token, with its NUL */

/* What nsn-app.cfg says; what it does not say is empty. */
struct nsn_app_config {
    uint32_t application_id;
    int log_level;
    int echo;
    char user[NSN_CREDENTIAL_MAX], password[NSN_CREDENTIAL_MAX], token[NSN_CREDENTIAL_MAX];
};

/* Reads the file; NULL: the one that INSANE_APP_CONFIG names, else nsn-app.cfg. 0, or a negative errno with words. */
int nsn_app_config_read(const char *path, struct nsn_app_config *config);
/* NULL: errno, and the words. */
struct nsn_insane *nsn_insane_open(const struct nsn_insane_options *options);
/* Waits up to wait_ns for those who have not taken their links. -EDEADLK in a callback: nothing was done. */
int nsn_insane_close(struct nsn_insane *insane, uint64_t wait_ns);
/* Calls that wait return -ESHUTDOWN from now on. */
void nsn_insane_shut_down(struct nsn_insane *insane);
const char *nsn_insane_error(void);
/* 1 when there is something to tell the user that belongs to no call: copied to text. */
int nsn_insane_warning(struct nsn_insane *insane, char *text, size_t size);
uint64_t nsn_insane_max_payload(struct nsn_insane *insane);
/* 1 in a child of the process that opened it. */
int nsn_insane_inherited(struct nsn_insane *insane);
/* 1 while attached to nsnd. */
int nsn_insane_attached(struct nsn_insane *insane);

int nsn_insane_create_stream(struct nsn_insane *insane, const struct nsn_options *options, uint32_t *stream);
int nsn_insane_destroy_stream(struct nsn_insane *insane, uint32_t stream);
int nsn_insane_create_source(struct nsn_insane *insane, uint32_t stream, uint32_t channel, uint32_t *source);
int nsn_insane_destroy_source(struct nsn_insane *insane, uint32_t source);
/* callback: an nsn_data_cb, or NULL. */
int nsn_insane_create_sink(struct nsn_insane *insane, uint32_t stream, uint32_t channel, void *callback, uint32_t *sink);
int nsn_insane_destroy_sink(struct nsn_insane *insane, uint32_t sink);

int nsn_insane_get_buffer(struct nsn_insane *insane, uint64_t size, uint64_t wait_ns, struct nsn_buffer **buffer);
/* The token, or a negative errno, and the buffer is still the caller's. deadline_ns (CLOCK_MONOTONIC; 0: the write
 * deadline from now): when sinks that have no room are given up. -EINTR: nothing was written, a signal handler is due. */
int nsn_insane_emit(struct nsn_insane *insane, uint32_t source, struct nsn_buffer *buffer, uint64_t deadline_ns);
/* The same for bytes that are the caller's, and stay so. */
int nsn_insane_send(struct nsn_insane *insane, uint32_t source, const uint8_t *bytes, uint64_t length, uint64_t deadline_ns);
uint64_t nsn_insane_write_deadline(struct nsn_insane *insane);
int nsn_insane_outcome(struct nsn_insane *insane, uint32_t source, int token);
/* 0 and *buffer, or -EAGAIN (wait_ns 0), -ETIMEDOUT, -EINTR … since_ns: when the wait began of which this is a part (for
 * -ENOTCONN); 0: now. */
int nsn_insane_consume(struct nsn_insane *insane, uint32_t sink, uint64_t wait_ns, uint64_t since_ns,
                       struct nsn_buffer **buffer);
int nsn_insane_available(struct nsn_insane *insane, uint32_t sink, uint64_t wait_ns);
uint64_t nsn_insane_dropped(struct nsn_insane *insane, uint32_t sink);
/* 1, or -EINVAL. */
int nsn_insane_release(struct nsn_insane *insane, struct nsn_buffer *buffer);

/* For an event loop: a descriptor that becomes readable when sinks may have something, or -errno. Then nsn_insane_look(),
 * and consume without waiting from the sinks of interest, and, before the loop sleeps, nsn_insane_watch_arm(): 1, sleep;
 * 0, look again. nsn_insane_watch_end: nobody watches for now. */
int nsn_insane_watch(struct nsn_insane *insane);
int nsn_insane_watch_arm(struct nsn_insane *insane);
void nsn_insane_look(struct nsn_insane *insane);
void nsn_insane_watch_end(struct nsn_insane *insane);

#endif
