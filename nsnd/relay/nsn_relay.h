/* A client whose user has permissions: it has no part in the fabric, but a socket on which it speaks NATS's client protocol
 * with this relay, which is a session in its place. Each line is checked here, on a copy that the client cannot change.
 */
#ifndef NSN_RELAY_H
#define NSN_RELAY_H

#include <stdint.h>

struct nsn_permissions;
struct nsn_relays;

struct nsn_relay_options {
    const char *socket_path; /* nsnd's control socket */
    const char *name;        /* by which nsnd knows the relay's session */
    const char *info;        /* JSON: what INFO says at first, */
    const char *lame_duck;   /* and once nsnd is a lame duck */
    uint32_t application_id;
    uint32_t subscriptions_max;
    uint64_t max_payload; /* bytes */
    uint64_t budget;      /* bytes of memory for what its subscribers have not read */
    uint64_t write_deadline_ns; /* how long a publish waits for a subscriber that does not read, and what is sent for a
                                   client that does not */
    struct nsn_relays *relays; /* all of the node, this one among them */
    const struct nsn_permissions *permissions; /* others may take their place meanwhile, by nsn_relay_permit() */
};

/* Serves a client, a connected non-blocking stream socket, until it or the session ends. Blocks; closes the socket. Everything
 * in the options stays the caller's, and else as it is meanwhile. */
void nsn_relay_run(int client, const struct nsn_relay_options *options);

/* From another thread: other permissions hold from the next time on that the relay wakes (nsnd sees to that). The ones before
 * stay the caller's, too, and as they are, until the relay has ended. */
void nsn_relay_permit(struct nsn_relay_options *options, const struct nsn_permissions *permissions);

#endif
