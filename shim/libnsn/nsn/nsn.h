/* INSANE's primitives: a program opens a session, makes streams with a quality of service, and on them sources and sinks of
 * numbered channels, through which buffers travel. The names, signatures and layouts are those of INSANE 2.0.
 *
 * Every program of this host (and, through nsnd, of other hosts) with the same application ID hears the others' channels;
 * channel n is the NATS subject "$INSANE.n". A program does not hear itself, unless its configuration says echo = true.
 *
 * Compile with `insane-nats config --cflags --libs`. The application ID is read from nsn-app.cfg in the working directory,
 * or from the file that INSANE_APP_CONFIG names:
 *
 *     [app]
 *     l4_port = 4444        # the application ID, 1 to 65535; a NATS program meets this one at nats://localhost:4444
 *     log_level = "warn"    # "none", "error", or "warn" (the default): what is written to stderr
 *     echo = false          # true: own sinks get what own sources emit
 *
 * Errors: functions that return int return a negative errno, functions that return a handle an invalid one, functions that
 * return a buffer an invalid one (data NULL, len 0) that belongs to the library. errno is set too, and nsn_error_text() has
 * the reason in words, and the way out. Failures to set something up are also written to stderr.
 *
 * Threads: every function may be called from any thread, any number at once. Only nsn_init, nsn_close and a fork() stand
 * apart: no other call may begin during nsn_close (those that wait are woken, and fail with ESHUTDOWN), and a child of
 * fork() gets ECHILD until it calls nsn_init itself. One buffer belongs to one thread at a time.
 *
 * When nsnd is gone, messages between programs that have met before go on. The library attaches to the next nsnd by itself,
 * whenever it is called; a call that waits does so for at most five more seconds (more only while an nsnd is being started),
 * and then fails with ENOTCONN if nothing came; calling it again is right.
 */
#ifndef NSN_H
#define NSN_H

#include <limits.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define INSANE_VERSION "2.0"
#define NSN_APP_DEFAULT_CONFIG_FILE "nsn-app.cfg"

/* nsn_init in a program that has a session; anything else in one that has none. Positive, since nothing is broken. */
#define NSN_ERROR_ALREADY_INITIALIZED 1
#define NSN_ERROR_NOT_INITIALIZED 2

/* --- buffers ------------------------------------------------------------------------------------------------------ */

/* Memory that the library lends. A program owns it from nsn_get_buffer, nsn_consume_data or a callback until it gives it
 * away by nsn_emit_data or nsn_release_data. Any number may be held at once, small ones as far as memory goes, those above
 * 8 KiB up to 256 MiB together. A copy of the struct stands for the same buffer. */
typedef struct nsn_buffer nsn_buffer_t;
struct nsn_buffer {
    size_t index;  /* the library's; of an invalid buffer the errno */
    uint8_t *data; /* from nsn_get_buffer: to be written. From a sink: to be read; above 8 KiB writing to it is a fault */
    size_t len;    /* bytes; set it to what the message has before nsn_emit_data */
};

/* 1 when there is a buffer: an empty message is one. */
static inline int nsn_buffer_is_valid(nsn_buffer_t *buf) { return buf != NULL && buf->data != NULL; }

/* --- quality of service ------------------------------------------------------------------------------------------- */

typedef struct nsn_options nsn_options_t;
struct nsn_options {
    int datapath;    /* between hosts: the kernel's network stack, or kernel bypass where both ends have it */
    int consumption; /* how sinks of the stream wait: spin; sleep at once; or spin while that has lately been paying off */
    int determinism; /* between hosts: fair share, or strict priority */
    int reliability; /* unreliable: a sink that has no room loses the message. Reliable: the emission waits for room */
};

#define NSN_QOS_DATAPATH_DEFAULT 0x0
#define NSN_QOS_DATAPATH_FAST 0x1

#define NSN_QOS_CONSUMPTION_POLL 0x0
#define NSN_QOS_CONSUMPTION_LOW 0x1
#define NSN_QOS_CONSUMPTION_ADAPTIVE 0x2

#define NSN_QOS_DETERMINISM_DEFAULT 0x0
#define NSN_QOS_DETERMINISM_TIMESENSITIVE 0x1

#define NSN_QOS_RELIABILITY_UNRELIABLE 0x0
#define NSN_QOS_RELIABILITY_RELIABLE 0x1

/* --- handles ------------------------------------------------------------------------------------------------------ */

#define NSN_INVALID_SNK UINT32_MAX
typedef uint32_t nsn_sink_t;

#define NSN_INVALID_SRC UINT32_MAX
typedef uint32_t nsn_source_t;

#define NSN_INVALID_STREAM_HANDLE UINT32_MAX
typedef uint32_t nsn_stream_t;

#define NSN_INVALID_PLUGIN_HANDLE UINT32_MAX

/* A sink's callback, an nsn_data_cb: called for each message, one at a time and in order, from one thread that the library
 * has for all callbacks of the program (signals are blocked in it). The buffer is the callback's own, to release or emit,
 * then or later. It may call everything but nsn_close. */
typedef void *handle_data_cb;
typedef void (*nsn_data_cb)(nsn_sink_t sink, nsn_buffer_t *buf);

#define NSN_BLOCKING 0x1
#define NSN_NONBLOCKING 0x2

/* --- the session -------------------------------------------------------------------------------------------------- */

/* Opens the program's session: reads the configuration, and attaches to the nsnd of this host, which is started when
 * nobody serves the application ID (INSANE_NATS_AUTOSTART=0 forbids that). 0, NSN_ERROR_ALREADY_INITIALIZED, or a negative
 * errno: ENOENT no configuration, EINVAL a mistake in it, ECONNREFUSED no nsnd, EACCES another user's, or one for a user with
 * permissions, EKEYREJECTED credentials that it does not know, EADDRINUSE the port is somebody else's, ETIMEDOUT no answer.
 * Waits up to some 20 seconds, where an nsnd must be started. */
int nsn_init(void);

/* Ends it: destroys what is left of streams, sources and sinks, and takes back every buffer (do not use their memory any
 * more). What was emitted stays readable by others; waits up to two seconds for those who have not yet taken their link.
 * 0, NSN_ERROR_NOT_INITIALIZED, or -EDEADLK from a callback. */
int nsn_close(void);

/* NSN_INVALID_STREAM_HANDLE: EINVAL, a policy that does not exist; EMFILE, more than 65,535 streams. */
nsn_stream_t nsn_create_stream(nsn_options_t opts);

/* Destroys its sources and sinks too. 0, or -EBADF. */
int nsn_destroy_stream(nsn_stream_t stream);

/* --- sending ------------------------------------------------------------------------------------------------------ */

/* A source of the channel source_id (0 to UINT32_MAX - 1). NSN_INVALID_SRC: EBADF, EINVAL, EMFILE. */
nsn_source_t nsn_create_source(nsn_stream_t stream, uint32_t source_id);
int nsn_destroy_source(nsn_source_t source);

/* A buffer of at least size bytes; len is size. flags NSN_BLOCKING waits, up to the write deadline of ten seconds, while
 * the memory for large buffers lies with readers. Invalid: EAGAIN, no memory now; ENOBUFS, this program holds all of it;
 * EMSGSIZE, above the node's max_payload (1 MiB unless configured). */
nsn_buffer_t *nsn_get_buffer(size_t size, int flags);

/* Emits the first len bytes of the buffer, which may also be one that was consumed, to all sinks of the source's channel. A
 * token for nsn_check_emit_outcome: then the buffer is the library's. Or a negative errno, and the buffer is still the
 * caller's: EBADF no such source, EINVAL no buffer of this program's, EMSGSIZE len above its size, ENOBUFS nsnd is gone and
 * what can wait for it does so already.
 * On a reliable stream it waits while a sink has no room, up to the write deadline (INSANE_NATS_WRITE_DEADLINE, 10 seconds):
 * then that sink is a slow consumer, and loses messages until it reads again. */
int nsn_emit_data(nsn_source_t source, nsn_buffer_t *buf);

/* What became of an emission: the number of sinks and subscriptions that it was handed to (0: nobody listens), -ENOBUFS when
 * at least one had no room and lost it, -ENOENT for a token that is none of the source's last 256. */
int nsn_check_emit_outcome(nsn_source_t source, int id);

/* --- receiving ---------------------------------------------------------------------------------------------------- */

/* A sink of the channel sink_id; cb NULL, or an nsn_data_cb. When it returns, every emission of this host that begins later
 * reaches it. It gets every message of the channel, whatever its sender's stream. NSN_INVALID_SNK: EBADF, EINVAL, EMFILE,
 * ETIMEDOUT (nsnd does not answer). */
nsn_sink_t nsn_create_sink(nsn_stream_t stream, uint32_t sink_id, handle_data_cb cb);

/* Messages that were not consumed are gone; buffers that were stay valid. When it returns, the callback runs no more
 * (unless it is the caller). */
int nsn_destroy_sink(nsn_sink_t sink);

/* The number of messages that can be consumed without waiting; flags NSN_BLOCKING waits until there is one. Or a negative
 * errno, as nsn_consume_data. */
int nsn_data_available(nsn_sink_t sink, int flags);

/* The next message. flags NSN_BLOCKING waits for it as the stream's consumption policy says. Invalid: EAGAIN, there is
 * none; EBADF; EINVAL, the sink has a callback; EINTR, a signal handler ran while it slept (a polling sink does not
 * notice); ENOTCONN, see above; ESHUTDOWN, nsn_close or nsn_destroy_sink was called. A sink whose program consumes from
 * its others but not from it keeps up to 65,536 messages or 64 MiB; what is more is dropped and counted. As long as the
 * program consumes nothing at all, messages wait in the fabric, which slows reliable emissions. */
nsn_buffer_t *nsn_consume_data(nsn_sink_t sink, int flags);

/* The number of buffers released: 1. Or -EINVAL: it is none of this program's, or was released or emitted before. */
int nsn_release_data(nsn_buffer_t *buf);

/* --- additions to INSANE 2.0 -------------------------------------------------------------------------------------- */

/* Why the last call in this thread failed, and the way out. Valid until the thread's next call. */
const char *nsn_error_text(void);

/* Messages that the sink lost because they were not consumed; 0 for an unknown sink. */
uint64_t nsn_sink_dropped(nsn_sink_t sink);

/* --- what INSANE's own header has besides ------------------------------------------------------------------------- */

typedef struct nsn_hdr nsn_hdr_t;
struct nsn_hdr {
    uint32_t channel_id;
};
#define INSANE_HEADER_LEN sizeof(nsn_hdr_t)

#ifdef __cplusplus
}
#endif

#endif
