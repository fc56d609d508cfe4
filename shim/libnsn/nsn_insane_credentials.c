/* Who an INSANE program is, where its application ID asks for credentials: said as a NATS client says it behind CONNECT. */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "nsn_insane_internal.h"

#define JSON_BYTES (6 * 2 * NSN_CREDENTIAL_MAX + 64) /* each character may take six */

static char *put_text(char *at, const char *key, const char *text)
{
    at += sprintf(at, "%s\"%s\":\"", at[-1] == '{' ? "" : ",", key);
    for (; *text; text++) {
        unsigned char byte = (unsigned char)*text;
        if (byte < 0x20 || byte == '"' || byte == '\\')
            at += sprintf(at, "\\u%04x", byte);
        else
            *at++ = *text;
    }
    return at + sprintf(at, "\"");
}

static bool is_long(const char *text) { return text && strlen(text) >= NSN_CREDENTIAL_MAX; }

int nsn_insane_introduce(struct nsn_insane *insane)
{
    const struct nsn_insane_options *options = &insane->options;
    if (!options->user && !options->password && !options->token)
        return 0;
    if (!options->user != !options->password || !options->user == !options->token)
        return nsn_insane_fail(-EINVAL, "credentials are either a user and a password, or a token");
    if (is_long(options->user) || is_long(options->password) || is_long(options->token))
        return nsn_insane_fail(-EINVAL, "a user, a password and a token have at most %d bytes", NSN_CREDENTIAL_MAX - 1);
    insane->credentials = malloc(JSON_BYTES);
    if (!insane->credentials)
        return nsn_insane_fail(-ENOMEM, "no memory for a session");
    char *at = insane->credentials + sprintf(insane->credentials, "{");
    if (options->token) {
        at = put_text(at, "auth_token", options->token);
    } else {
        at = put_text(at, "user", options->user);
        at = put_text(at, "pass", options->password);
    }
    strcpy(at, "}");
    return 0;
}

void nsn_insane_forget_credentials(struct nsn_insane *insane)
{
    if (insane->credentials)
        explicit_bzero(insane->credentials, JSON_BYTES);
    free(insane->credentials);
}

void nsn_insane_answer(struct nsn_insane *insane)
{
    char nonce[64];
    if (insane->credentials && nsn_session_challenge(insane->session, nonce, sizeof nonce))
        nsn_session_answer(insane->session, (const uint8_t *)insane->credentials, strlen(insane->credentials));
}

/* Its user is known, and has permissions: it is offered a relay, which speaks NATS. */
bool nsn_insane_is_relayed(struct nsn_insane *insane)
{
    int relay = nsn_session_relay(insane->session);
    if (relay >= 0)
        close(relay);
    return relay >= 0;
}
